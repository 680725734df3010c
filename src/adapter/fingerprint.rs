//! A few numbers that tell one frozen weight from another, by the norms of its rows.

use crate::error::Result;
use crate::rng::SplitMix64;
use candle_core::{DType, Device, Tensor};

/// The first number is `N = sqrt(sum n0²)`, the others four sums of `n0` under the signs of a hash.
/// None where all norms are zero.
pub(crate) fn fingerprint(norms: &Tensor) -> Result<Option<[f64; 5]>> {
    // On the host, for Metal has no f64.
    let norms = norms.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let norms: Vec<f64> = norms.to_vec1()?;
    // Of f64 norms the squares may leave the range: those are of norms divided by the largest.
    let largest = norms.iter().copied().fold(0., f64::max);
    let by = if largest > 1e150 { largest } else { 1. };
    let mut rng = SplitMix64::new(0);
    let mut sums = [0f64; 5];
    for n in &norms {
        let hash = rng.next_u64();
        sums[0] += n / by * (n / by);
        for (k, sum) in sums[1..].iter_mut().enumerate() {
            *sum += if hash >> k & 1 == 1 { -n } else { *n };
        }
    }
    sums[0] = by * sums[0].sqrt();
    Ok((sums[0] > 0.).then_some(sums))
}

/// Whether two fingerprints are of different weights. Casts and 8-bit quantization move them by at
/// most 2e-4, 4-bit by 4e-3; another matrix or other rows by 2e-2 and more.
pub(crate) fn differs(a: &[f64; 5], b: &[f64; 5]) -> bool {
    let apart = (1..5).map(|k| ((a[k] - b[k]) / a[0]).powi(2)).sum::<f64>();
    (b[0] / a[0] - 1.).abs() > 5e-3 || (apart / 4.).sqrt() > 5e-3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_is_that_of_the_format() -> Result<()> {
        let norms = Tensor::new(&[5f64, 13.], &Device::Cpu)?;
        let found = fingerprint(&norms)?.expect("norms above zero");
        assert_eq!(found, [13.92838827718412, 8., 8., -18., 8.]);
        assert!(fingerprint(&Tensor::zeros(3, DType::F32, &Device::Cpu)?)?.is_none());
        assert!(differs(&found, &[13.92838827718412, 8., 8., -18., 8.2]));
        assert!(!differs(&found, &[13.93, 8., 8., -18., 8.001]));
        let far = fingerprint(&(&norms * 1e200)?)?.expect("norms above zero");
        assert!(
            (far[0] / 13.92838827718412e200 - 1.).abs() < 1e-14,
            "{far:?}"
        );
        Ok(())
    }
}
