//! Text from a model, token by token.

use super::model::{Cache, Model};
use super::tokenizer::Text;
use anyhow::{Result, ensure};
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
    ensure!(!prompt.is_empty(), "the prompt has no tokens");
    let room = model.config.context.saturating_sub(prompt.len());
    ensure!(
        room > 0,
        "the prompt has {} tokens, which leaves no room in the model's context of {}; shorten it",
        prompt.len(),
        model.config.context
    );
    let mut rng = SplitMix64::new(sampling.seed);
    let mut cache = Cache::default();
    let mut logits = model.next(prompt, &mut cache)?;
    let mut ids = Vec::new();
    for _ in 0..sampling.max_tokens.min(room) {
        let logits_now = logits.to_vec1::<f32>()?;
        ensure!(
            logits_now.iter().all(|logit| logit.is_finite()),
            "the model computes logits that are not finite: is it, or its adapter, damaged?"
        );
        let id = choose(&logits_now, sampling.temperature, &mut rng);
        if text.ends.contains(&id) || text.end_of_turn() == Some(id) {
            break;
        }
        ids.push(id);
        each(&ids)?;
        if ids.len() < sampling.max_tokens.min(room) {
            logits = model.next(&[id], &mut cache)?;
        }
    }
    text.decode(&ids)
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
