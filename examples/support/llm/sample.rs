//! Text from a model, token by token.

use super::model::{Cache, Model};
use super::tokenizer::Text;
use anyhow::{Result, ensure};
use candle_core::Tensor;
use candle_doft::rng::SplitMix64;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// 0 takes the likeliest.
    pub temperature: f64,
    pub seed: u64,
    pub max_tokens: usize,
}

/// What follows the tokens of a prompt, up to its end or `max_tokens`. `each` sees every new token.
pub fn answer(
    model: &Model,
    text: &Text,
    prompt: &[u32],
    sampling: Sampling,
    mut each: impl FnMut(&[u32]) -> Result<()>,
) -> Result<String> {
    check(model, prompt)?;
    let under = |_: &[usize], run: &mut Pass| run();
    let all = answers(model, text, &[prompt], sampling, under, |_, ids| each(ids))?;
    Ok(all.concat())
}

/// A pass of the model.
pub type Pass<'a> = dyn FnMut() -> candle_core::Result<Tensor> + 'a;

/// Whether a prompt has tokens, and leaves room for an answer.
pub fn check(model: &Model, prompt: &[u32]) -> Result<()> {
    ensure!(!prompt.is_empty(), "the prompt has no tokens");
    ensure!(
        prompt.len() < model.config.context,
        "the prompt has {} tokens, which leaves no room in the model's context of {}; shorten it",
        prompt.len(),
        model.config.context
    );
    Ok(())
}

/// One text of a batch, by its place in it.
struct Row {
    place: usize,
    ids: Vec<u32>,
    rng: SplitMix64,
    /// Tokens at most.
    room: usize,
}

/// What follows each of some checked prompts. They run as one batch; a row that has ended leaves it. `under` runs a
/// pass for the rows that it is given, which are places in `prompts`; `each` sees every new token of a row. A row
/// is answered as it is alone.
pub fn answers(
    model: &Model,
    text: &Text,
    prompts: &[&[u32]],
    sampling: Sampling,
    under: impl Fn(&[usize], &mut Pass) -> candle_core::Result<Tensor>,
    mut each: impl FnMut(usize, &[u32]) -> Result<()>,
) -> Result<Vec<String>> {
    let mut found = vec![String::new(); prompts.len()];
    let mut rows = Vec::new();
    for (place, prompt) in prompts.iter().enumerate() {
        let room = model.config.context.saturating_sub(prompt.len());
        rows.push(Row {
            place,
            ids: Vec::new(),
            rng: SplitMix64::new(sampling.seed),
            room: room.min(sampling.max_tokens),
        });
    }
    rows.retain(|row| row.room > 0);
    let mut next: Vec<Vec<u32>> = rows.iter().map(|row| prompts[row.place].to_vec()).collect();
    let mut cache = Cache::default();
    while !rows.is_empty() {
        let places: Vec<usize> = rows.iter().map(|row| row.place).collect();
        let tokens: Vec<&[u32]> = next.iter().map(Vec::as_slice).collect();
        let logits = under(&places, &mut || model.next(&tokens, &mut cache))?;
        let (mut stay, mut left) = (Vec::new(), Vec::new());
        for (at, mut row) in rows.into_iter().enumerate() {
            let logits = logits.get(at)?.to_vec1::<f32>()?;
            ensure!(
                logits.iter().all(|logit| logit.is_finite()),
                "the model computes logits that are not finite: is it, or its adapter, damaged?"
            );
            let id = choose(&logits, sampling.temperature, &mut row.rng);
            let ended = text.ends.contains(&id) || text.end_of_turn() == Some(id);
            if !ended {
                row.ids.push(id);
                each(row.place, &row.ids)?;
            }
            if ended || row.ids.len() == row.room {
                found[row.place] = text.decode(&row.ids)?;
            } else {
                stay.push(at);
                left.push(row);
            }
        }
        if !stay.is_empty() && stay.len() < places.len() {
            cache.retain(&stay)?;
        }
        rows = left;
        next = rows
            .iter()
            .map(|row| row.ids[row.ids.len() - 1..].to_vec())
            .collect();
    }
    Ok(found)
}

fn choose(logits: &[f32], temperature: f64, rng: &mut SplitMix64) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    if temperature <= 0. {
        return best as u32;
    }
    let top = f64::from(logits[best]);
    let weights: Vec<f64> = logits
        .iter()
        .map(|logit| ((f64::from(*logit) - top) / temperature).exp())
        .collect();
    let mut left = rng.uniform() * weights.iter().sum::<f64>();
    for (id, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0. {
            return id as u32;
        }
    }
    best as u32
}
