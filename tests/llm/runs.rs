//! The programs, from an untouched model to a merged one.

use crate::common::tensors::{CPU, relative};
use crate::programs::{Ended, Home};
use crate::small::{frozen, ids, logits};
use crate::support::llm::model::Model;
use crate::support::llm::weights::Weights;
use crate::support::methods::{Method, TunerBuilder};
use anyhow::Result;
use candle_doft::Adapter;

#[test]
fn a_stopped_run_goes_on_to_the_same_bytes_for_every_method() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    for method in ["doft", "lora", "dora", "oft"] {
        let (whole, parts) = (format!("{method}-whole"), format!("{method}-parts"));
        let common = ["--method", method, "--out"];
        let run = |more: &[&str]| home.finetune(&[common.as_slice(), more].concat());
        run(&[&home.at(&whole)]);
        run(&[&home.at(&parts), "--stop-after", "3"]);
        run(&[&home.at(&parts), "--resume"]);
        let same = home.adapter(&whole) == home.adapter(&parts);
        assert!(same, "{method}: resumed is not the same");
        let steps: Vec<u64> = home
            .metrics(&parts)
            .iter()
            .filter(|line| line.get("loss").is_some())
            .map(|line| line["step"].as_u64().unwrap())
            .collect();
        assert_eq!(steps, [1, 2, 3, 4, 5, 6], "{method}");
        assert!(home.path(&whole).join("loss.svg").exists());
    }
    home.finetune(&["--method", "none", "--out", &home.at("none")]);
    Ok(())
}

#[test]
fn a_finished_run_resumed_changes_nothing() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let out = home.at("out");
    home.finetune(&["--out", &out]);
    let (adapter, metrics) = (home.adapter("out"), home.metrics("out"));
    home.finetune(&["--out", &out, "--resume"]);
    assert!(adapter == home.adapter("out"));
    assert_eq!(metrics, home.metrics("out"));
    Ok(())
}

#[test]
fn a_run_that_is_replaced_is_named_before() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let out = home.at("out");
    let first = home.try_finetune(&["--out", &out, "--stop-after", "2"]);
    assert!(!first.err.contains("note:"), "{}", first.err);
    let again = home.try_finetune(&["--out", &out, "--stop-after", "1"]);
    assert_eq!(again.code, Some(0), "{}", again.err);
    let note = "holds a run of 2 steps, which this one replaces; --resume goes on with it";
    assert!(again.err.contains(note), "{}", again.err);
    Ok(())
}

#[test]
fn progress_is_told_where_there_is_no_terminal() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let flags = ["--out", &home.at("out"), "--steps", "12", "--every", "12"];
    let ended = home.try_finetune(&flags);
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let told = ended
        .err
        .lines()
        .filter(|line| line.contains("of 12: loss"));
    let told: Vec<&str> = told.collect();
    assert_eq!(told.len(), 1, "{}", ended.err);
    assert!(told[0].starts_with("step 10 of 12: loss "), "{}", told[0]);
    Ok(())
}

#[test]
fn plain_text_is_gone_on_with_before_and_after() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    std::fs::write(home.path("own.txt"), "abc def ghi jkl mno\n".repeat(20))?;
    let data = home.at("own.txt");
    let out = home.finetune(&["--out", &home.at("out"), "--data", &data]);
    for (start, count) in [("> ", 2), ("  before: ", 1), ("  now:    ", 1)] {
        let found = out.lines().filter(|line| line.starts_with(start)).count();
        assert_eq!(found, count, "`{start}` in {out}");
    }
    Ok(())
}

#[test]
fn a_merged_model_and_an_unmerged_one_answer_alike() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let (model, merged) = (home.at("model"), home.at("merged"));
    home.finetune(&["--out", &home.at("out"), "--merge-to", &merged]);
    let adapter = home.path("out").join("adapter.safetensors");
    let adapter = adapter.display().to_string();
    let ask = ["--prompt", "say 3", "--max-tokens", "12"];
    let with = |first: &[&str]| home.generate(&[first, ask.as_slice()].concat());
    let unmerged = with(&["--model", &model, "--adapter", &adapter]);
    assert_eq!(with(&["--model", &merged]), unmerged);
    let on_load = with(&["--model", &model, "--adapter", &adapter, "--merge"]);
    assert_eq!(on_load, unmerged);
    let none = with(&["--model", &model, "--adapter", &adapter, "--strength", "0"]);
    assert_eq!(none, with(&["--model", &model]));
    let warm = ["--model", &model, "--temperature", "2", "--seed", "1"];
    assert_eq!(with(&warm), with(&warm));

    // The merged folder holds the weights that act.
    let base = Weights::open(&home.path("model"), false, &CPU)?;
    let method = Method::Doft(Box::default());
    let builder = TunerBuilder::with_adapter(method, Adapter::load(&adapter, &CPU)?);
    let model = Model::new(&base, &builder, &CPU)?;
    builder.finish()?;
    let off = relative(
        &logits(
            &frozen(&Weights::open(&home.path("merged"), false, &CPU)?)?,
            &ids()?,
        )?,
        &logits(&model, &ids()?)?,
    );
    assert!(off < 1e-5, "merged is {off:e} away");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |name: &str| -> Result<u32> {
            Ok(std::fs::metadata(home.path("merged").join(name))?
                .permissions()
                .mode())
        };
        assert_eq!(mode("model.safetensors")?, mode("config.json")?);
    }
    Ok(())
}

#[test]
fn magnitudes_train_at_a_rate_of_their_own() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    // By the largest change of a magnitude of the run; the gradient's sign rules the first steps.
    let moved = |out: &str, rate: &str| -> Result<f64> {
        home.finetune(&["--out", &home.at(out), "--magnitude-rate", rate]);
        let adapter = home.path(out).join("adapter.safetensors");
        let all = candle_core::safetensors::load(adapter, &CPU)?;
        let mut most = 0f64;
        for (_, values) in all
            .iter()
            .filter(|(name, _)| name.ends_with("dora_log_multiplier"))
        {
            most = most.max(f64::from(values.abs()?.max_all()?.to_scalar::<f32>()?));
        }
        Ok(most)
    };
    let (one, tenth) = (moved("one", "1")?, moved("tenth", "0.1")?);
    let ratio = tenth / one;
    assert!((0.05..0.2).contains(&ratio), "{tenth:e} of {one:e}");
    Ok(())
}

#[test]
fn recomputed_activations_train_the_same_adapter_but_for_rounding() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    home.finetune(&["--out", &home.at("kept")]);
    home.finetune(&["--out", &home.at("again"), "--checkpoint-activations"]);
    let load = |out: &str| {
        let file = home.path(out).join("adapter.safetensors");
        candle_core::safetensors::load(file, &CPU)
    };
    let again = load("again")?;
    for (name, kept) in load("kept")? {
        let off = relative(&again[&name], &kept);
        assert!(off < 1e-3, "{name} is off by {off:e}");
    }
    Ok(())
}

/// Ctrl-C in the middle of a run, as soon as it has made some steps.
#[cfg(unix)]
fn interrupted(home: &Home, out: &str, more: &[&str]) -> Result<Ended> {
    use std::process::{Command, Stdio};
    let mut command = home.command("finetune");
    let out_folder = home.at(out);
    let flags = home.training(&[&["--out", &out_folder], more].concat());
    let command = command.args(flags).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn()?;
    let metrics = home.path(out).join("metrics.jsonl");
    let seen = || std::fs::read_to_string(&metrics).is_ok_and(|m| m.matches("loss").count() >= 3);
    let start = std::time::Instant::now();
    while !seen() {
        let waited = start.elapsed().as_secs();
        assert!(
            child.try_wait()?.is_none(),
            "it ended before it was interrupted"
        );
        assert!(waited < 120, "no step was made in {waited} s");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let interrupt = format!("kill -INT {}", child.id());
    assert!(
        Command::new("sh")
            .args(["-c", &interrupt])
            .status()?
            .success()
    );
    Ok(child.wait_with_output()?.into())
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_keeps_a_checkpoint_and_goes_on_to_the_same_bytes() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    // Long enough that the signal comes while it trains; nothing else would write a checkpoint.
    let long = ["--steps", "300", "--every", "300"];
    let ended = interrupted(&home, "parts", &long)?;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("--resume goes on"), "{}", ended.err);
    let made = home
        .metrics("parts")
        .iter()
        .filter_map(|l| l["step"].as_u64())
        .max();
    assert!(made >= Some(3) && made < Some(300), "{made:?}");
    assert!(home.path("parts").join("checkpoint.safetensors").exists());
    let left: Vec<_> = std::fs::read_dir(home.path("parts"))?
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "half-written files were left: {left:?}");

    let run = |out: &str, more: &[&str]| {
        let out = home.at(out);
        home.finetune(&[&["--out", &out], long.as_slice(), more].concat())
    };
    run("parts", &["--resume"]);
    run("whole", &[]);
    assert!(home.adapter("parts") == home.adapter("whole"));
    let steps = |out: &str| -> Vec<u64> {
        let lines = home.metrics(out).into_iter();
        let lines = lines.filter(|line| line.get("loss").is_some());
        lines.map(|line| line["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(steps("parts"), steps("whole"));
    Ok(())
}
