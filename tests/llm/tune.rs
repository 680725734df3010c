//! `tune-strength`: a strength that is chosen on one part of the texts, and done in the file.

use crate::programs::{Ended, Home};
use anyhow::Result;
use candle_core::{Device, Tensor, safetensors};

/// A second text, and an adapter that was trained on the first; nothing where the program is not built.
fn prepared(method: &str) -> Result<Option<Home>> {
    let Some(home) = Home::new()? else {
        return Ok(None);
    };
    if crate::common::programs::example("tune-strength").is_none() {
        return Ok(None);
    }
    let lines: String = (0..40)
        .map(|i| format!("{{\"text\": \"the {i} quick brown foxes jump\"}}\n"))
        .collect();
    std::fs::write(home.path("keep.jsonl"), lines)?;
    home.finetune(&[
        "--out",
        &home.at("run"),
        "--method",
        method,
        "--steps",
        "12",
    ]);
    Ok(Some(home))
}

fn tune(home: &Home, more: &[&str]) -> Ended {
    let (model, data) = (home.at("model"), home.at("data.jsonl"));
    let adapter = home.at("run/adapter.safetensors");
    let model: &[&str] = match more.contains(&"--model") {
        true => &[],
        false => &["--model", &model],
    };
    let usual = ["--data", &data, "--adapter", &adapter];
    let short = ["--seq", "32", "--sequences", "4"];
    home.run("tune-strength", &[model, &usual, &short, more].concat())
}

/// The rows of the first table: strength, then target and kept text on the part that chooses and the other.
fn rows(out: &str) -> Vec<Vec<f64>> {
    let lines = out.lines().take_while(|line| line.starts_with('|')).skip(2);
    let cells = |line: &str| {
        let cells = line.trim_matches('|').split('|');
        let number = |cell: &str| cell.trim().parse().unwrap_or(f64::NAN);
        cells.map(number).collect()
    };
    lines.map(cells).collect()
}

fn tensors(home: &Home, file: &str) -> Result<Vec<(String, Tensor)>> {
    let loaded = safetensors::load(home.path(file), &Device::Cpu)?;
    let mut all: Vec<(String, Tensor)> = loaded.into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(all)
}

fn same(a: &[(String, Tensor)], b: &[(String, Tensor)], within: f64) -> Result<bool> {
    for ((name, a), (other, b)) in a.iter().zip(b) {
        assert_eq!(name, other);
        let apart = (a - b)?.abs()?.flatten_all()?.max(0)?;
        if f64::from(apart.to_scalar::<f32>()?) > within {
            return Ok(false);
        }
    }
    Ok(a.len() == b.len())
}

#[test]
fn the_strength_of_the_lowest_perplexity_is_what_the_file_has() -> Result<()> {
    let Some(home) = prepared("doft")? else {
        return Ok(());
    };
    let (output, picture) = (home.at("tuned.safetensors"), home.at("curve.svg"));
    let ended = tune(&home, &["--output", &output, "--picture", &picture]);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let rows = rows(&ended.out);
    assert!(rows.len() > 7, "{}", ended.out);
    assert!(rows.is_sorted_by(|a, b| a[0] < b[0]), "{}", ended.out);
    let best = rows.iter().min_by(|a, b| a[1].total_cmp(&b[1])).unwrap();
    // Rows that print the same perplexity may differ behind it.
    let chosen = ended
        .out
        .lines()
        .find(|l| l.starts_with("chosen: strength"));
    let chosen = chosen.unwrap().split(' ').nth(2).unwrap().to_string();
    let row = rows
        .iter()
        .find(|row| row[0] == chosen.parse::<f64>().unwrap());
    assert_eq!(row.unwrap()[1], best[1], "{}", ended.out);
    // Twelve steps on this text make it easier to read.
    assert!(best[1] < 0.95 * rows[0][1], "{}", ended.out);
    assert!(std::fs::read_to_string(&picture)?.starts_with("<svg"));

    let run = home.at("run/adapter.safetensors");
    let by_convert = home.at("converted.safetensors");
    let flags = ["--to", "doft", "--strength", &chosen];
    let paths = ["--adapter", &run, "--output", &by_convert];
    let ended = home.run("convert", &[&flags[..], &paths].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let (tuned, converted) = (
        tensors(&home, "tuned.safetensors")?,
        tensors(&home, "converted.safetensors")?,
    );
    assert!(same(&tuned, &converted, 1e-5)?, "strength {chosen}");
    Ok(())
}

#[test]
fn what_must_not_suffer_bounds_the_strength() -> Result<()> {
    let Some(home) = prepared("oft")? else {
        return Ok(());
    };
    // A model that knows the second text, and an adapter that makes it forget.
    let (keep, start) = (home.at("keep.jsonl"), home.at("start"));
    let first = [
        "--out",
        &home.at("first"),
        "--data",
        &keep,
        "--merge-to",
        &start,
    ];
    home.finetune(&[&first[..], &["--steps", "30"]].concat());
    home.finetune(&["--out", &home.at("run"), "--model", &start, "--steps", "30"]);
    let chosen = |allow: &str| {
        let flags = ["--model", &start, "--keep", &keep, "--allow", allow];
        let ended = tune(&home, &flags);
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        let line = ended
            .out
            .lines()
            .find(|l| l.starts_with("chosen: strength"));
        let strength = line.unwrap().split(' ').nth(2).unwrap();
        (strength.parse::<f64>().unwrap(), rows(&ended.out))
    };
    let (free, free_rows) = chosen("100000");
    let (bound, rows) = chosen("0.2");
    let rise = |row: &[f64]| row[2] / rows[0][2] - 1.;
    let row = rows.iter().find(|row| row[0] == bound).unwrap();
    assert!(rise(row) < 0.201, "{row:?}");
    let mut allowed = rows.iter().filter(|row| rise(row) < 0.199);
    assert!(allowed.all(|other| other[1] >= row[1]), "{rows:?}");
    // Without the bound another strength is chosen, and the second text suffers.
    let freest = free_rows.iter().find(|row| row[0] == free).unwrap();
    assert!(
        rise(freest) > 0.2 && free > bound,
        "{free} {bound} {rows:?}"
    );
    Ok(())
}

#[test]
fn layers_and_blocks_have_strengths_of_their_own() -> Result<()> {
    let Some(home) = prepared("oft")? else {
        return Ok(());
    };
    for (flag, count) in [("--per-layer", 14), ("--per-block", 2)] {
        let output = home.at("tuned.safetensors");
        let ended = tune(&home, &[flag, "--passes", "1", "--output", &output]);
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        let groups = ended
            .out
            .lines()
            .filter(|l| l.starts_with("| model.layers."));
        let strength = |line: &str| -> f64 {
            let cell = line.trim_matches('|').split('|').nth(1).unwrap();
            cell.trim().parse().unwrap()
        };
        let strengths: Vec<f64> = groups.map(strength).collect();
        assert_eq!(strengths.len(), count, "{}", ended.out);
        assert!(strengths.iter().all(|s| (0. ..=1.2).contains(s)));
        // Each layer is the whole one with its angles scaled: in the file the values have the ratio of the tangents.
        let whole = tensors(&home, "run/adapter.safetensors")?;
        let tuned = tensors(&home, "tuned.safetensors")?;
        assert_eq!(whole.len(), tuned.len());
        let unchanged = same(&whole, &tuned, 0.)?;
        assert_eq!(
            unchanged,
            strengths.iter().all(|s| *s == 1.),
            "{strengths:?}"
        );
    }
    Ok(())
}

#[test]
fn what_cannot_be_tuned_is_refused_in_one_line() -> Result<()> {
    let Some(home) = prepared("lora")? else {
        return Ok(());
    };
    let refused = |more: &[&str], code: i32, parts: &[&str]| {
        let ended = tune(&home, more);
        assert_eq!(ended.code, Some(code), "{}", ended.err);
        let errors = ended.err.lines().filter(|line| line.starts_with("error: "));
        assert_eq!(errors.count(), 1, "{}", ended.err);
        for part in parts {
            assert!(ended.err.contains(part), "no `{part}` in {}", ended.err);
        }
    };
    let output = home.at("tuned.safetensors");
    refused(&["--output", &output], 1, &["LoRA", "model.layers."]);
    refused(
        &["--output", &home.at("none/tuned.safetensors")],
        1,
        &["there is no folder"],
    );
    refused(&["--output", &home.at("run")], 1, &["is a folder"]);
    refused(&["--seq", "4096"], 2, &["--seq"]);
    refused(&["--keep", &home.at("none.txt")], 1, &["none.txt"]);
    refused(&["--allow", "0.1"], 2, &["--keep"]);
    assert!(!home.path("tuned.safetensors").exists());
    Ok(())
}
