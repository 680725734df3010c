//! Prompts of different lengths under different adapters, answered in one batch as each is alone.

use crate::common::tensors::{CPU, disturb_all, relative, seeded};
use crate::programs::{Ended, Home};
use crate::small::{configurations, logits, model_folder, weights};
use crate::support::llm::model::{Cache, Model};
use crate::support::llm::sample::{Pass, Sampling, answer, answers};
use crate::support::llm::tokenizer::Text;
use crate::support::llm::weights::Weights;
use crate::support::methods::{Method, TunerBuilder};
use anyhow::Result;
use candle_core::Tensor;
use candle_doft::{Adapters, DoftConfig, Map, Mode, Targets};
use serde_json::Value;

/// A model that adapts nothing itself.
fn untuned(weights: &Weights) -> Result<(Model, Adapters)> {
    let nothing = DoftConfig::default().with_targets(Targets::None);
    let method = Method::Doft(Box::new(nothing));
    let builder = TunerBuilder::new(method, 0, &CPU)?;
    let model = Model::new(weights, &builder, &CPU)?;
    let tuner = builder.finish()?;
    let adapters = Adapters::new("", tuner.adapter().unwrap().clone());
    Ok((model, adapters))
}

/// A model with three adapters that differ in what can differ, away from their start.
fn served(weights: &Weights) -> Result<(Model, Adapters)> {
    let (model, adapters) = untuned(weights)?;
    let config = DoftConfig::default();
    for (name, config) in [
        ("fr", config.clone().with_block_size(8)),
        (
            "de",
            DoftConfig::oft()
                .with_block_size(4)
                .with_map(Map::Exponential),
        ),
        (
            "it",
            config
                .with_block_size(16)
                .with_targets(["v_proj", "down_proj"]),
        ),
    ] {
        let adapter = adapters.add(name, config)?;
        let shift = name.len() + name.as_bytes()[0] as usize;
        disturb_all(
            adapter
                .vars()
                .into_iter()
                .cycle()
                .skip(shift)
                .take(adapter.vars().len()),
            0.4,
        )?;
    }
    Ok((model, adapters))
}

const ROWS: [(&str, Option<&str>); 6] = [
    ("a", Some("fr")),
    ("what is the time", Some("de")),
    ("what is the time", None),
    ("say 3", Some("it")),
    ("a rather long text, so that others are padded", Some("fr")),
    ("a", None),
];

fn tokens(text: &Text) -> Result<Vec<Vec<u32>>> {
    ROWS.iter().map(|(prompt, _)| text.prompt(prompt)).collect()
}

/// The answer to one row by itself, and its tokens.
fn alone(
    (model, adapters, text): (&Model, &Adapters, &Text),
    row: usize,
    sampling: Sampling,
) -> Result<(String, Vec<u32>)> {
    let prompt = &tokens(text)?[row];
    let mut seen = Vec::new();
    let mut run = || {
        let each = |ids: &[u32]| {
            seen = ids.to_vec();
            Ok(())
        };
        answer(model, text, prompt, sampling, each)
    };
    let found = match ROWS[row].1 {
        Some(name) => adapters.get(name)?.with_mode(Mode::Eval, &mut run),
        None => adapters.get("")?.with_mode(Mode::Off, &mut run),
    }?;
    Ok((found, seen))
}

#[test]
fn a_batch_of_mixed_adapters_answers_each_row_as_it_is_alone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (_, mut text) = model_folder(folder.path())?;
    for config in configurations() {
        let (model, adapters) = served(&weights(&config)?)?;
        let greedy = Sampling {
            temperature: 0.,
            seed: 3,
            max_tokens: 24,
        };
        // First without ends, so that one is known that comes early in a row, and not in all.
        text.ends.clear();
        let (_, free) = alone((&model, &adapters, &text), 1, greedy)?;
        let early = free.get(5).copied();
        let ends = [text.ends.clone(), early.into_iter().collect()];
        for ends in ends {
            text.ends = ends;
            for temperature in [0., 1.5] {
                let sampling = Sampling {
                    temperature,
                    ..greedy
                };
                let prompts = tokens(&text)?;
                let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
                let sizes = std::cell::RefCell::new(Vec::new());
                let under = |rows: &[usize], run: &mut Pass| {
                    sizes.borrow_mut().push(rows.len());
                    let names: Vec<_> = rows.iter().map(|row| ROWS[*row].1).collect();
                    adapters.rows(&names)?.run(run)
                };
                let mut seen = vec![Vec::new(); ROWS.len()];
                let each = |row: usize, ids: &[u32]| {
                    assert_eq!(ids.len(), seen[row].len() + 1);
                    seen[row] = ids.to_vec();
                    Ok(())
                };
                let found = answers(&model, &text, &prompts, sampling, under, each)?;
                for row in 0..ROWS.len() {
                    let expected = alone((&model, &adapters, &text), row, sampling)?;
                    let found = (found[row].clone(), seen[row].clone());
                    assert_eq!(found, expected, "{config}: row {row} at {temperature}");
                }
                // Adapters matter, and rows leave where they end.
                if text.ends.is_empty() {
                    assert_ne!(seen[1], seen[2]);
                    assert_ne!(seen[0], seen[5]);
                }
                let sizes = sizes.into_inner();
                assert_eq!(sizes[0], ROWS.len());
                assert!(sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
                if !text.ends.is_empty() && temperature == 0. {
                    assert!(
                        sizes.last() < sizes.first() || sizes.len() < 24,
                        "{sizes:?}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn padding_changes_no_logits() -> Result<()> {
    for config in configurations() {
        let (model, adapters) = served(&weights(&config)?)?;
        let row = |n: u32, salt: u32| (0..n).map(|i| (i * 37 + salt) % 256).collect::<Vec<u32>>();
        let rows = [row(9, 1), row(14, 2), row(11, 3)];
        let names = [Some("fr"), None, Some("de")];
        let scope = adapters.rows(&names)?;
        let mut cache = Cache::default();
        let starts: Vec<&[u32]> = [3, 7, 1]
            .iter()
            .zip(&rows)
            .map(|(n, row)| &row[..*n])
            .collect();
        let mut next = scope.run(|| model.next(&starts, &mut cache))?;
        let mut at = [3, 7, 1];
        let whole = |row: usize| -> Result<Tensor> {
            let ids = Tensor::new(rows[row].as_slice(), &CPU)?.unsqueeze(0)?;
            let alone = adapters.rows(&[names[row]])?;
            alone.run(|| logits(&model, &ids))
        };
        let expected = [whole(0)?, whole(1)?, whole(2)?];
        for _ in 0..5 {
            for (row, all) in expected.iter().enumerate() {
                let off = relative(&next.get(row)?, &all.get(0)?.get(at[row] - 1)?);
                assert!(off < 5e-6, "{config}: row {row}: {off:e}");
            }
            let new: Vec<&[u32]> = at
                .iter()
                .zip(&rows)
                .map(|(n, row)| &row[*n..n + 1])
                .collect();
            next = scope.run(|| model.next(&new, &mut cache))?;
            at = at.map(|n| n + 1);
        }
        assert_eq!(cache.len(), 12);
        // The first leaves; the others go on, in another order.
        cache.retain(&[2, 1])?;
        let new: [&[u32]; 2] = [&rows[2][at[2]..=at[2]], &rows[1][at[1]..=at[1]]];
        let scope = adapters.rows(&[names[2], names[1]])?;
        let next = scope.run(|| model.next(&new, &mut cache))?;
        for (place, row) in [2, 1].into_iter().enumerate() {
            let off = relative(&next.get(place)?, &expected[row].get(0)?.get(at[row])?);
            assert!(off < 5e-6, "{config}: row {row}: {off:e}");
        }
        let two = scope.run(|| model.next(&[&[1, 2], &[3, 4]], &mut cache));
        assert!(
            two.unwrap_err()
                .to_string()
                .starts_with("rows of different lengths")
        );
    }
    Ok(())
}

/// Eight rows under eight adapters on SmolLM2, where its file is at hand.
#[test]
fn the_real_model_answers_eight_rows_under_eight_adapters_as_each_alone() -> Result<()> {
    let Some(file) = std::env::var_os("CANDLE_DOFT_SMOLLM2") else {
        println!("SKIPPED: CANDLE_DOFT_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf");
        return Ok(());
    };
    let weights = Weights::open(std::path::Path::new(&file), true, &CPU)?;
    let text = Text::open(&weights)?;
    let (model, adapters) = untuned(&weights)?;
    let names: Vec<String> = (0..8).map(|i| format!("a{i}")).collect();
    for (i, name) in names.iter().enumerate() {
        let adapter = adapters.add(name, DoftConfig::default())?;
        for (at, var) in adapter.vars().into_iter().enumerate() {
            let noise = seeded(var.dims(), (1000 * i + at) as u64).to_dtype(var.dtype())?;
            var.set(&var.add(&(noise * 0.02)?)?)?;
        }
    }
    let sampling = Sampling {
        temperature: 0.,
        seed: 0,
        max_tokens: 10,
    };
    let asked = ["Define Happiness.", "Hi", "What is the capital of France?"];
    let prompts: Vec<Vec<u32>> = (0..8)
        .map(|row| text.prompt(asked[row % 3]))
        .collect::<Result<_>>()?;
    let rows: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let under = |rows: &[usize], run: &mut Pass| {
        let rows: Vec<_> = rows.iter().map(|row| Some(names[*row].as_str())).collect();
        adapters.rows(&rows)?.run(run)
    };
    let found = answers(&model, &text, &rows, sampling, under, |_, _| Ok(()))?;
    for (row, found) in found.iter().enumerate() {
        let run = || answer(&model, &text, rows[row], sampling, |_| Ok(()));
        let alone = adapters.get(&names[row])?.with_mode(Mode::Eval, run)?;
        assert_eq!(*found, alone, "row {row}");
    }
    assert_ne!(found[0], found[3], "the adapters change nothing");
    Ok(())
}

/// A home with the adapters `fr` and `de` in files.
fn home() -> Result<Option<Home>> {
    let Some(home) = Home::new()? else {
        return Ok(None);
    };
    let (_, adapters) = served(&Weights::open(&home.path("model"), false, &CPU)?)?;
    for name in ["fr", "de"] {
        adapters.get(name)?.save(home.path(name))?;
    }
    Ok(Some(home))
}

#[test]
fn generate_answers_a_file_of_prompts_in_order() -> Result<()> {
    let Some(home) = home()? else { return Ok(()) };
    let asked = [
        ("say 3", Some("fr")),
        ("tell me of the sea, at length", Some("de")),
        ("say 3", None),
        ("say 3", Some("de")),
        ("\u{e9}", Some("fr")),
    ];
    let mut lines = String::new();
    for (prompt, adapter) in asked {
        lines += &match adapter {
            Some(name) => serde_json::json!({"prompt": prompt, "adapter": name}),
            None => serde_json::json!({"prompt": prompt}),
        }
        .to_string();
        lines += "\n\n";
    }
    lines += "{\"adapter\": null, \"prompt\": \"last\"}";
    std::fs::write(home.path("prompts.jsonl"), lines)?;
    let (fr, de) = (
        format!("fr={}", home.at("fr")),
        format!("de={}", home.at("de")),
    );
    let model = home.at("model");
    let both = [
        "--model",
        &model,
        "--max-tokens",
        "12",
        "--adapter",
        &fr,
        "--adapter",
        &de,
    ];
    let file = home.at("prompts.jsonl");
    let mut outs = Vec::new();
    for batch in ["1", "4", "8"] {
        let flags = ["--prompts", &file, "--batch", batch];
        outs.push(home.generate(&[both.as_slice(), &flags].concat()));
    }
    assert!(outs[0] == outs[1] && outs[1] == outs[2], "{outs:?}");
    let answered: Vec<Value> = outs[0]
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(answered.len(), asked.len() + 1);
    for ((prompt, adapter), line) in asked.into_iter().chain([("last", None)]).zip(&answered) {
        assert_eq!(
            (line["prompt"].as_str(), line["adapter"].as_str()),
            (Some(prompt), adapter)
        );
        let file = adapter.map(|name| home.at(name));
        let mut one = vec!["--model", &model, "--max-tokens", "12", "--prompt", prompt];
        if let Some(file) = &file {
            one.extend(["--adapter", file]);
        }
        let alone = home.generate(&one);
        assert_eq!(
            line["answer"].as_str().map(|a| format!("{a}\n")),
            Some(alone.clone())
        );
        if let Some(name) = adapter {
            let used =
                home.generate(&[both.as_slice(), &["--prompt", prompt, "--use", name]].concat());
            assert_eq!(used, alone);
        }
    }
    assert_ne!(answered[0]["answer"], answered[2]["answer"]);
    assert!(outs[0].starts_with("{\"prompt\":\"say 3\",\"adapter\":\"fr\",\"answer\":"));
    // One adapter without a name is called `adapter`.
    std::fs::write(
        home.path("one.jsonl"),
        r#"{"prompt": "say 3", "adapter": "adapter"}"#,
    )?;
    let flags = [
        "--model",
        &model,
        "--max-tokens",
        "12",
        "--prompts",
        &home.at("one.jsonl"),
    ];
    let out = home.generate(&[&flags[..], &["--adapter", &home.at("fr")]].concat());
    assert_eq!(
        serde_json::from_str::<Value>(&out)?["answer"],
        answered[0]["answer"]
    );
    Ok(())
}

fn refused(ended: Ended, code: i32, parts: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.err);
    assert!(ended.out.is_empty(), "{}", ended.out);
    assert_eq!(ended.err.lines().count(), 1, "{}", ended.err);
    for part in parts {
        assert!(ended.err.contains(part), "no `{part}` in {}", ended.err);
    }
}

#[test]
fn what_does_not_fit_together_is_refused() -> Result<()> {
    let Some(home) = home()? else { return Ok(()) };
    let (fr, de) = (
        format!("fr={}", home.at("fr")),
        format!("de={}", home.at("de")),
    );
    let (model, bare) = (home.at("model"), home.at("fr"));
    let with = |more: &[&str]| home.run("generate", &[&["--model", &model], more].concat());
    let both = ["--adapter", &fr, "--adapter", &de];
    let ask = ["--prompt", "x"];
    let flags = |more: &[&str]| with(&[&both[..], &ask, more].concat());
    refused(flags(&[]), 2, &["--use", "`fr`, `de`"]);
    refused(
        flags(&["--use", "it"]),
        2,
        &["no adapter is called `it`", "`fr`, `de`"],
    );
    refused(
        flags(&["--use", "fr", "--merge"]),
        2,
        &["--merge takes one --adapter"],
    );
    refused(
        flags(&["--use", "fr", "--strength", "0.5"]),
        2,
        &["--strength takes one --adapter"],
    );
    let twice = with(
        &[
            &["--adapter", &fr, "--adapter", &fr, "--use", "fr"][..],
            &ask,
        ]
        .concat(),
    );
    refused(twice, 2, &["both called `fr`"]);
    let unnamed = with(
        &[
            &["--adapter", &fr, "--adapter", &bare, "--use", "fr"][..],
            &ask,
        ]
        .concat(),
    );
    refused(unnamed, 2, &["has no name", "--adapter NAME=FILE"]);
    let gone = format!("fr={}", home.at("gone"));
    let gone = with(
        &[
            &["--adapter", &gone, "--adapter", &de, "--use", "de"][..],
            &ask,
        ]
        .concat(),
    );
    refused(gone, 1, &["gone"]);

    let prompts = home.at("prompts.jsonl");
    let lines = |content: &str, code: i32, parts: &[&str]| -> Result<()> {
        std::fs::write(&prompts, content)?;
        refused(
            with(&[&both[..], &["--prompts", &prompts]].concat()),
            code,
            parts,
        );
        Ok(())
    };
    let good = "{\"prompt\": \"x\"}\n";
    lines(
        &format!("{good}\n{{\"prompt\": 3}}"),
        1,
        &["prompts.jsonl: line 3", "expected an object"],
    )?;
    lines(
        &format!("{good}what"),
        1,
        &["line 2", "expected an object of `prompt` and `adapter`"],
    )?;
    lines(
        &format!("{good}{{\"adapter\": \"fr\"}}"),
        1,
        &["line 2", "missing field `prompt`"],
    )?;
    lines(
        "{\"prompt\": \"x\", \"adaptor\": \"fr\"}",
        1,
        &["line 1", "unknown field `adaptor`"],
    )?;
    let unknown = "{\"prompt\": \"x\", \"adapter\": \"it\"}";
    lines(
        &format!("{good}{unknown}"),
        1,
        &["line 2", "no adapter is called `it`", "`fr`, `de`"],
    )?;
    lines("\n", 1, &["it holds no prompts"])?;
    let long = serde_json::json!({"prompt": "long ".repeat(100)}).to_string();
    lines(&format!("{good}{long}"), 1, &["line 2", "leaves no room"])?;
    std::fs::write(&prompts, good)?;
    let file = ["--prompts", prompts.as_str()];
    refused(
        with(&["--prompts", &home.at("none.jsonl")]),
        1,
        &["none.jsonl"],
    );
    let one = ["--adapter", fr.as_str()];
    refused(
        with(&[&one, &file[..], &["--merge"]].concat()),
        2,
        &["--merge takes one --adapter"],
    );
    for wrong in [
        [&file[..], &ask].concat(),
        [&both[..], &file, &["--use", "fr"]].concat(),
        [&file[..], &["--batch", "0"]].concat(),
        vec!["--adapter", "=x", "--prompt", "x"],
        vec!["--adapter", "x=", "--prompt", "x"],
    ] {
        let ended = with(&wrong);
        assert_eq!(ended.code, Some(2), "{wrong:?}: {}", ended.err);
        assert!(
            ended.out.is_empty() && ended.err.starts_with("error: "),
            "{}",
            ended.err
        );
    }
    Ok(())
}
