//! Whether all ranks still hold the same.

use super::agree::rank;
use super::{Processes, gather};
use crate::error::Result;
use crate::train::AdamW;
use candle_core::{DType, Device, Tensor};

/// Checks by hash that variables and moments are the same on all ranks, bit for bit. To be asked before a
/// checkpoint: it costs 8 bytes for each tensor.
///
/// # Errors
///
/// [`Error::Rank`](crate::Error::Rank) with the first rank that differs from rank 0, and the tensor.
///
/// # Examples
///
/// ```
/// # use candle_core::{DType, Device, Var};
/// # use candle_doft::train::{AdamW, Checkpoint, Group, parallel::{Alone, check_replicas, lead}};
/// # let group = Alone;
/// # let folder = tempfile::tempdir().unwrap();
/// # let file = folder.path().join("checkpoint.safetensors");
/// # let vars = vec![("a".to_string(), Var::zeros(1, DType::F32, &Device::Cpu)?)];
/// # let optimizer = AdamW::new(vec![Group::new(vars)], Default::default())?;
/// check_replicas(&group, &optimizer)?;
/// lead(&group, || Checkpoint::save(&file, &optimizer, &(), &()))?;
/// assert!(file.exists());
/// # Ok::<(), candle_doft::Error>(())
/// ```
pub fn check_replicas(group: &dyn Processes, optimizer: &AdamW) -> Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let mut named: Vec<(String, Tensor)> = Vec::new();
    for (name, var) in optimizer.named_vars() {
        named.push((format!("trained.{name}"), var.as_tensor().clone()));
    }
    for (name, state) in optimizer.states()? {
        named.push((format!("first.{name}"), state.first));
        named.push((format!("second.{name}"), state.second));
        named.extend(state.master.map(|wide| (format!("master.{name}"), wide)));
    }
    // Names first: what differs in number has buffers of other lengths.
    let names: Vec<&str> = named.iter().map(|(name, _)| name.as_str()).collect();
    let names = fnv(names.join(" ").bytes().map(u64::from));
    super::same(
        group,
        "what is trained",
        &format!("{} tensors, names {names:016x}", named.len()),
    )?;
    super::same(group, "the step", &optimizer.steps().to_string())?;
    let mut record = Vec::new();
    for (_, tensor) in &named {
        record.extend(hash(tensor)?.to_le_bytes());
    }
    let records = gather(group, &record)?;
    for (other, found) in records.iter().enumerate().skip(1) {
        let differs = |i: &usize| found[i * 8..][..8] != records[0][i * 8..][..8];
        if let Some(i) = (0..named.len()).find(differs) {
            let reason = format!(
                "after step {} its `{}` is not that of rank 0: the replicas have drifted apart; go on from \
                 the last checkpoint, with the same build, threads and kind of processor on all ranks",
                optimizer.steps(),
                named[i].0
            );
            return Err(rank(other, reason));
        }
    }
    Ok(())
}

fn hash(tensor: &Tensor) -> Result<u64> {
    let host = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    Ok(match host.dtype() {
        DType::F64 => fnv(host.to_vec1::<f64>()?.into_iter().map(f64::to_bits)),
        // Half floats widen without loss.
        _ => fnv(host
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?
            .into_iter()
            .map(|value| u64::from(value.to_bits()))),
    })
}

/// FNV-1a, over words.
fn fnv(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        (hash ^ word).wrapping_mul(0x0100_0000_01b3)
    })
}
