//! Configurations: defaults, block sizes as other tools choose them, patterns, and JSON.

use candle_core::{DType, Device, Tensor};
use candle_doft::config::{Rule, nearest_divisor};
use candle_doft::rng::SplitMix64;
use candle_doft::{Adapter, DoftConfig, Magnitude, Map, Pattern, Targets};
use candle_nn::Linear;
use proptest::prelude::*;

#[test]
fn block_sizes_are_those_of_onetrainer() {
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/onetrainer/block_sizes.json"
    );
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let rows: Vec<[usize; 3]> = serde_json::from_value(json["rows"].clone()).unwrap();
    assert_eq!(rows.len(), 522);
    assert_eq!((nearest_divisor(12, 0), nearest_divisor(1, 0)), (1, 1));
    for [width, asked, used] in rows {
        assert_eq!(nearest_divisor(width, asked), used, "{width}, {asked}");
    }
}

proptest! {
    #[test]
    fn a_block_size_divides_and_no_other_divisor_is_nearer(width in 1usize..2000, asked in 1usize..2500) {
        let used = nearest_divisor(width, asked);
        prop_assert_eq!(width % used, 0);
        let off = |d: usize| d.abs_diff(asked.min(width));
        for d in (1..=width).filter(|d| width % d == 0) {
            prop_assert!(off(d) > off(used) || (off(d) == off(used) && d >= used));
        }
    }
}

#[test]
fn defaults_are_those_of_the_table() {
    let config = DoftConfig::default();
    assert_eq!(
        (config.block_size, config.block_share, config.scaled),
        (32, false, true)
    );
    assert_eq!(
        (config.map, config.magnitude),
        (Map::Cayley, Magnitude::Log)
    );
    assert_eq!(
        (config.max_norm, config.dropout, config.seed),
        (None, 0., 0)
    );
    assert_eq!(config.targets, Targets::All);
    assert_eq!(DoftConfig::oft(), config.with_magnitude(Magnitude::None));
}

#[test]
fn divisors_are_those_of_the_table() {
    for (b, cayley) in [
        (8, 5.291503),
        (16, 7.745967),
        (32, 11.135529),
        (128, 22.538855),
    ] {
        for (map, expected) in [
            (Map::Cayley, cayley),
            (Map::SERIES, cayley),
            (Map::Exponential, cayley / 2.),
        ] {
            let found = map.divisor(b);
            assert!((found / expected - 1.).abs() <= 1e-6, "{map:?}: {found}");
        }
    }
    assert_eq!(
        (Map::Cayley.divisor(1), Map::Exponential.divisor(0)),
        (1., 1.)
    );
}

#[test]
fn patterns_mean_names_globs_and_regular_expressions() {
    let regex = || Pattern::Regex(r"layers\.\d+\.(q|k)_proj".into());
    for (pattern, path, expected) in [
        // A name is a path or the end of one, at a dot; `*` stops at a dot and `**` does not.
        (Pattern::from("q_proj"), "layers.0.q_proj", true),
        (Pattern::from("proj"), "layers.0.q_proj", false),
        (Pattern::from("q_proj"), "layers.0.freq_proj", false),
        (Pattern::from("attn.q_proj"), "layers.0.attn.q_proj", true),
        (Pattern::from("layers.*.q_proj"), "layers.0.q_proj", true),
        (
            Pattern::from("layers.*.q_proj"),
            "layers.0.attn.q_proj",
            false,
        ),
        (Pattern::from("*.q_proj"), "layers.0.q_proj", false),
        (Pattern::from("**.q_proj"), "layers.0.q_proj", true),
        (Pattern::from("**.q_proj"), "layers.0.attn.q_proj", true),
        (
            Pattern::from("layers.[01].{q,k}_proj"),
            "layers.1.k_proj",
            true,
        ),
        (
            Pattern::from("layers.[01].{q,k}_proj"),
            "layers.2.k_proj",
            false,
        ),
        (regex(), "layers.12.k_proj", true),
        (regex(), "model.layers.12.k_proj", false),
    ] {
        assert_eq!(
            pattern.matches(path).unwrap(),
            expected,
            "{pattern:?} and {path}"
        );
    }
}

#[test]
fn a_configuration_survives_json_and_may_be_partial() {
    let config = DoftConfig::default()
        .with_block_size(16)
        .with_map(Map::CayleyNeumann {
            terms: 7,
            last_coefficient: 2,
        })
        .with_max_norm(0.5)
        .with_magnitude(Magnitude::Absolute)
        .with_targets(["q_proj", "layers.*.v_proj"])
        .with_exclude(["lm_head"])
        .with_rule(Rule::new("q_proj").with_block_size(8).with_max_norm(0.));
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<DoftConfig>(&text).unwrap(), config);
    let partial: DoftConfig =
        serde_json::from_str(r#"{"block_size": 8, "map": "exponential"}"#).unwrap();
    assert_eq!(
        partial,
        DoftConfig::default()
            .with_block_size(8)
            .with_map(Map::Exponential)
    );
    assert!(serde_json::from_str::<DoftConfig>(r#"{"map": "spin"}"#).is_err());
}

#[test]
fn a_map_is_read_from_its_name_and_shown_by_it() {
    for (text, map) in [
        ("cayley", Map::Cayley),
        ("exponential", Map::Exponential),
        ("neumann:5", Map::SERIES),
        (
            "neumann:3:2",
            Map::CayleyNeumann {
                terms: 3,
                last_coefficient: 2,
            },
        ),
    ] {
        assert_eq!(text.parse::<Map>().unwrap(), map);
        assert_eq!(map.to_string(), text);
    }
    for text in ["", "neumann", "neumann:65", "neumann:5:3", "cayley:1"] {
        let error = text.parse::<Map>().unwrap_err().to_string();
        let expected = "expected cayley, exponential, neumann:T or neumann:T:2";
        assert_eq!(error, format!("config: `map` is `{text}`, {expected}"));
    }
}

/// A pattern is compiled once, not for each layer and rule.
#[test]
fn a_hundred_rules_over_five_hundred_layers_are_quick() {
    let rules = (0..100).map(|i| Rule::new(Pattern::Regex(format!(r"layers\.{i}\..*_proj"))));
    let config = rules.fold(DoftConfig::default(), DoftConfig::with_rule);
    let paths: Vec<String> = (0..500).map(|i| format!("layers.{i}.q_proj")).collect();
    let start = std::time::Instant::now();
    let mut matched = 0;
    for path in &paths {
        for rule in &config.rules {
            matched += usize::from(rule.pattern.matches(path).unwrap());
        }
    }
    assert_eq!(matched, 100);
    // 10 s where each is compiled anew, a hundredth of that here.
    let took = start.elapsed().as_secs_f64();
    assert!(took < 2., "{took} s");
}

/// Decimal text of a number has to come back as the same number, or saving a loaded adapter drifts.
#[test]
fn numbers_of_a_configuration_come_back_bit_for_bit() -> candle_doft::Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("a"), folder.path().join("b"));
    let mut draw = SplitMix64::new(7);
    let weight = Tensor::ones((4, 16), DType::F32, &Device::Cpu)?;
    for _ in 0..200 {
        let bound = draw.uniform() * 0.9;
        let config = DoftConfig::default()
            .with_block_size(8)
            .with_max_norm(bound);
        let builder = Adapter::builder(config, &Device::Cpu)?;
        builder.wrap("layer", Linear::new(weight.clone(), None))?;
        builder.finish()?.save(&first)?;
        let builder = Adapter::load(&first, &Device::Cpu)?;
        builder.wrap("layer", Linear::new(weight.clone(), None))?;
        let again = builder.finish()?;
        assert_eq!(again.config().max_norm, Some(bound));
        again.save(&second)?;
        assert_eq!(
            std::fs::read(&first).unwrap(),
            std::fs::read(&second).unwrap()
        );
    }
    Ok(())
}
