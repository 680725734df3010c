//! Damaged files: an error or an adapter, never a panic, and nothing beside what was asked for.

use super::extract::{config, options};
use super::{Home, listing};
use candle_doft::file::{Changes, Combination, LoadOptions, Target, combine, convert_with};
use candle_doft::merge::extract;
use candle_doft::rng::SplitMix64;
use candle_doft::{Map, Result};
use std::collections::BTreeMap;

/// Some bytes changed, some cut off, some swapped for others of the file.
fn damaged(bytes: &[u8], rng: &mut SplitMix64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let below = |rng: &mut SplitMix64, n: usize| (rng.next_u64() % n.max(1) as u64) as usize;
    for _ in 0..1 + below(rng, 4) {
        // Most of them in the header, where numbers and names are.
        let end = if below(rng, 3) > 0 {
            bytes.len().min(2000)
        } else {
            bytes.len()
        };
        let at = below(rng, end);
        match below(rng, 4) {
            0 => bytes[at] = rng.next_u64() as u8,
            1 => bytes[at] = b"0123456789-.eE[]{},\""[below(rng, 20)],
            2 => bytes[at] ^= 1 << below(rng, 8),
            _ => {
                let from = below(rng, bytes.len());
                bytes[at] = bytes[from];
            }
        }
    }
    if below(rng, 10) == 0 {
        bytes.truncate(below(rng, bytes.len()));
    }
    bytes
}

#[test]
fn damaged_files_end_in_an_error_or_in_a_whole_result() -> Result<()> {
    let home = Home::new();
    let mut rng = SplitMix64::new(5);
    let good = home.adapter_of("good", &["a", "conv"], config(), 0.1, 0)?;
    let series = config().with_map(Map::SERIES);
    let series = home.adapter_of("series", &["a"], series, 0.1, 0)?;
    let (options_of_files, none) = (LoadOptions::default(), BTreeMap::new());
    let (bad, out) = (home.path("bad"), home.path("out"));
    std::fs::write(&bad, "").unwrap();
    std::fs::write(&out, "before").unwrap();
    let before = listing(&home);
    let target = Target::Series {
        drop_magnitude: true,
    };
    let strength = Changes::default().with_strength(0.5);
    let projected = Changes::default().with_projection(true).with_strength(-0.5);
    let mut refused = 0;
    for round in 0..600 {
        let source = if round % 2 == 0 { &good } else { &series };
        let bytes = damaged(&std::fs::read(source).unwrap(), &mut rng);
        std::fs::write(&bad, &bytes).unwrap();
        let mean = Combination::Mean(vec![0.5, 0.5]);
        let results = [
            convert_with(
                &bad,
                &out,
                Target::Doft,
                &options_of_files,
                &none,
                &strength,
            )
            .map(drop),
            convert_with(&bad, &out, target, &options_of_files, &none, &projected).map(drop),
            combine(&[&good, &bad], &mean, &out, &options_of_files, &none).map(drop),
            combine(
                &[&bad, &good],
                &Combination::Product,
                &out,
                &options_of_files,
                &none,
            )
            .map(drop),
        ];
        refused += results.iter().filter(|result| result.is_err()).count();
        if round % 4 == 0 {
            let bytes = damaged(&std::fs::read(home.base()).unwrap(), &mut rng);
            std::fs::write(&bad, &bytes).unwrap();
            let _ = extract(home.base(), &bad, &out, options(config()));
            let _ = extract(&bad, home.base(), &out, options(config()));
        }
        assert_eq!(listing(&home), before, "round {round}");
    }
    assert!(refused > 600, "{refused}");
    Ok(())
}
