//! What a user may get wrong: one line that says what to do, and the exit code for whose fault it is.

use crate::programs::{Ended, Home};
use crate::small::{configurations, write_gguf};
use anyhow::Result;
use candle_core::quantized::GgmlDType;

/// One line that holds all of `parts`; 1 is an error of data or files, 2 wrong arguments.
fn refused(ended: Ended, code: i32, parts: &[&str]) {
    let err = &ended.err;
    assert_eq!(ended.code, Some(code), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(err.starts_with("error: "), "{err}");
    for part in parts {
        assert!(err.contains(part), "no `{part}` in {err}");
    }
    assert!(ended.out.is_empty(), "{}", ended.out);
}

#[test]
fn a_model_that_is_none() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let no_model = |model: &str, parts: &[&str]| {
        let ask = ["--prompt", "x", "--model", model];
        refused(home.run("generate", &ask), 1, parts);
        refused(
            home.try_finetune(&["--out", &home.at("out"), "--model", model]),
            1,
            parts,
        );
    };
    no_model("nowhere", &["nowhere: no such file", "owner/model"]);
    no_model("./no/where", &["./no/where: no such file"]);
    std::fs::create_dir(home.path("empty"))?;
    let parts = ["empty: config.json", "GGUF file or a folder"];
    no_model(&home.at("empty"), &parts);
    std::fs::create_dir(home.path("no_weights"))?;
    let config = home.path("model/config.json");
    std::fs::copy(&config, home.path("no_weights/config.json"))?;
    no_model(
        &home.at("no_weights"),
        &["model.safetensors cannot be read"],
    );

    let file = home.path("model/model.safetensors");
    let whole = std::fs::read(&file)?;
    for kept in [4, 100, whole.len() - 1] {
        std::fs::write(&file, &whole[..kept])?;
        no_model(&home.at("model"), &["model.safetensors", "fetch it again"]);
    }
    std::fs::write(&file, &whole)?;
    std::fs::remove_file(home.path("model/tokenizer.json"))?;
    no_model(&home.at("model"), &["tokenizer.json is missing"]);

    let gguf = home.path("model.gguf");
    write_gguf(&gguf, &configurations()[0], GgmlDType::F32)?;
    let whole = std::fs::read(&gguf)?;
    for kept in [0, 3, 300, whole.len() - 1] {
        std::fs::write(&gguf, &whole[..kept])?;
        no_model(&home.at("model.gguf"), &["model.gguf", "fetch it again"]);
    }
    std::fs::write(&gguf, "plain text, and more of it")?;
    let parts = ["not a GGUF file", "a folder in Hugging Face layout"];
    no_model(&home.at("model.gguf"), &parts);
    Ok(())
}

#[test]
fn text_that_cannot_be_trained_on() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let out = home.at("out");
    let refuse = |name: &str, content: &[u8], parts: &[&str]| {
        std::fs::write(home.path(name), content).unwrap();
        let flags = ["--out", &out, "--data", &home.at(name)];
        refused(home.try_finetune(&flags), 1, parts);
    };
    refuse("empty.txt", b"", &["empty.txt", "0 tokens", "--seq"]);
    refuse("short.txt", b"short", &["short.txt", "5 tokens", "--seq"]);
    refuse("empty.jsonl", b"", &["empty.jsonl", "0 usable examples"]);
    let typo = b"{\"prompt\": \"a\", \"answer\": \"b\"}\n";
    refuse("typo.jsonl", typo, &["line 1", "`completion`"]);
    let array = b"[\"a\", \"b\"]\n";
    refuse("array.json", array, &["line 1", "an object on each line"]);
    refuse("text.jsonl", b"plain text\n", &["line 1", "no JSON"]);
    refuse("latin.txt", b"caf\xe9", &["latin.txt", "UTF-8"]);
    // A prompt that fills the sequence leaves nothing to learn.
    let long = format!(
        "{{\"prompt\": \"{}\", \"completion\": \"b\"}}\n",
        "a".repeat(99)
    );
    refuse("long.jsonl", long.repeat(3).as_bytes(), &["--seq"]);
    let missing = home.try_finetune(&["--out", &out, "--data", &home.at("none.txt")]);
    refused(missing, 1, &["none.txt"]);
    Ok(())
}

#[test]
fn flags_that_fit_neither_model_nor_run() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let out = home.at("out");
    let refuse = |more: &[&str], code: i32, parts: &[&str]| {
        let flags = [&["--out", out.as_str()], more].concat();
        refused(home.try_finetune(&flags), code, parts);
    };
    refuse(&["--seq", "4096"], 1, &["--seq 4096", "128", "smaller"]);
    let beyond = ["--stop-after 7", "--steps 6"];
    refuse(&["--stop-after", "7"], 2, &beyond);
    let magnitudes = ["--method", "lora", "--magnitude-rate", "0.1"];
    refuse(&magnitudes, 2, &["--magnitude-rate is for --method doft"]);
    for method in ["doft", "lora", "dora"] {
        let flags = ["--method", method, "--targets", "q_proj", "w_proj"];
        refuse(&flags, 1, &["w_proj", "q_proj"]);
    }
    refuse(&["--resume"], 1, &["checkpoint.safetensors", "--out"]);
    let long = "a".repeat(200);
    refuse(&["--prompt", &long], 1, &["201 tokens", "128", "shorten"]);

    home.finetune(&["--out", &out, "--stop-after", "1"]);
    for (flag, value) in [
        ("--lr", "0.5"),
        ("--method", "oft"),
        ("--block-size", "16"),
        ("--steps", "7"),
        ("--seed", "1"),
    ] {
        refuse(
            &["--resume", flag, value],
            1,
            &["resume with the same flags"],
        );
    }
    let other: String = (0..40)
        .map(|i| format!("{{\"prompt\": \"say {i}\", \"completion\": \"it was {i}\"}}\n"))
        .collect();
    std::fs::write(home.path("other.jsonl"), other)?;
    let other = ["--resume", "--data", &home.at("other.jsonl")];
    refuse(&other, 1, &["data_checksum", "resume with the same flags"]);
    // What was there is still there.
    home.finetune(&["--out", &out, "--resume"]);

    let ask = ["--model", &home.at("model"), "--prompt"];
    let ended = home.run("generate", &[ask.as_slice(), &[&long]].concat());
    refused(ended, 1, &["201 tokens", "128", "shorten"]);
    let adapter = ["x", "--adapter", &home.at("none.safetensors")];
    let ended = home.run("generate", &[ask.as_slice(), &adapter].concat());
    refused(ended, 1, &["none.safetensors"]);
    Ok(())
}

#[test]
fn a_step_that_does_not_fit_into_memory() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    if !cfg!(target_os = "linux") {
        println!("SKIPPED: the memory that is left is read on Linux");
        return Ok(());
    }
    let (out, many) = (home.at("out"), "1000000000");
    let refuse = |more: &[&str], parts: &[&str]| {
        let flags = [&["--out", out.as_str(), "--batch", many], more].concat();
        let ended = home.try_finetune(&flags);
        refused(ended, 1, &[&["--batch 1000000000", "GB"], parts].concat());
    };
    refuse(&[], &["--checkpoint-activations"]);
    refuse(&["--checkpoint-activations"], &["a smaller --seq"]);
    Ok(())
}

#[test]
fn a_folder_to_write_to_that_is_a_file() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let flags = ["--out", &home.at("data.jsonl")];
    let parts = ["data.jsonl is a file", "expected a folder"];
    refused(home.try_finetune(&flags), 1, &parts);
    Ok(())
}

/// clap's own errors: what is wrong, the usage, and 2.
#[test]
fn wrong_arguments_and_help() -> Result<()> {
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let model = home.at("model");
    for (program, arguments) in [
        ("finetune", vec!["--model", &model]),
        (
            "finetune",
            vec!["--model", &model, "--out", "x", "--steps", "0"],
        ),
        (
            "finetune",
            vec!["--model", &model, "--out", "x", "--lr", "-1"],
        ),
        (
            "finetune",
            vec!["--model", &model, "--out", "x", "--merge-type", "q4_0"],
        ),
        ("generate", vec!["--model", &model]),
        (
            "generate",
            vec!["--model", &model, "--prompt", "x", "--merge"],
        ),
        (
            "generate",
            vec!["--model", &model, "--prompt", "x", "--strength", "2"],
        ),
        (
            "generate",
            vec!["--model", &model, "--prompt", "x", "--temperature", "-1"],
        ),
    ] {
        let ended = home.run(program, &arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}: {}", ended.err);
        assert!(ended.err.starts_with("error: "), "{}", ended.err);
    }
    for program in ["finetune", "generate"] {
        let ended = home.run(program, &["--help"]);
        assert_eq!(ended.code, Some(0));
        for flag in ["--model", "--seed", "--dequantize"] {
            assert!(ended.out.contains(flag), "{program}: {flag}");
        }
    }
    Ok(())
}
