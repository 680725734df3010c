//! Models and tokenizers as other programs write them.

use crate::common::golden::golden;
use crate::common::tensors::CPU;
use crate::small::{configurations, frozen, model_folder, tensors, write_folder, write_tokenizer};
use crate::support::llm::config::Config;
use crate::support::llm::template::{Message, Template};
use crate::support::llm::tokenizer::Text;
use crate::support::llm::weights::Weights;
use anyhow::Result;
use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

pub fn error<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("no error"),
        Err(error) => format!("{error:#}"),
    }
}

/// The folders of `tests/llm/folders.py`.
#[test]
fn folders_of_transformers_have_its_logits_and_tokens() -> Result<()> {
    for name in ["llama", "qwen2", "qwen3"] {
        let folder = tempfile::tempdir()?;
        copy(&golden(&format!("transformers/{name}")), folder.path());
        let expected: Value =
            serde_json::from_slice(&std::fs::read(folder.path().join("expected.json"))?)?;
        let ids: Vec<u32> = serde_json::from_value(expected["ids"][0].clone())?;
        let ids = Tensor::new(ids, &CPU)?.unsqueeze(0)?;
        for (variant, logits) in expected["logits"].as_object().unwrap() {
            if variant != "config.json" {
                std::fs::copy(
                    folder.path().join(variant),
                    folder.path().join("config.json"),
                )?;
            }
            let weights = Weights::open(folder.path(), false, &CPU)?;
            let model = frozen(&weights)?;
            let found = model.logits(&model.hidden(&model.embed(&ids)?, false)?)?;
            for (at, row) in logits.as_object().unwrap() {
                let row: Vec<f32> = serde_json::from_value(row.clone())?;
                let found = found.get(0)?.get(at.parse()?)?.to_vec1::<f32>()?;
                for (a, b) in found.iter().zip(&row) {
                    let off = (a - b).abs();
                    assert!(off < 1e-4, "{name}, {variant}, token {at}: {a} and {b}");
                }
            }
        }
        let text = Text::open(&Weights::open(folder.path(), false, &CPU)?)?;
        for case in expected["texts"].as_array().unwrap() {
            let mut ids = text.begin.clone();
            ids.extend(text.encode(case["text"].as_str().unwrap())?);
            assert_eq!(json!(ids), case["ids"], "{name}: {}", case["text"]);
        }
        for case in expected["chats"].as_array().unwrap() {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone())?;
            let ids = text.chat(&messages)?;
            let shown = text.decode(&ids)?;
            assert_eq!(json!(ids), case["ids"], "{name}: {shown}");
        }
    }
    Ok(())
}

#[test]
fn the_scaling_of_positions_is_read_or_refused_by_name() -> Result<()> {
    let with = |changes: Value| {
        let mut config = configurations()[0].clone();
        config.as_object_mut().unwrap().remove("rope_theta");
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        Config::from_json(&config.to_string())
    };
    let theta = |changes| with(changes).map(|config| config.theta);
    assert_eq!(theta(json!({}))?, 1e4);
    assert_eq!(theta(json!({"rope_theta": 5e5}))?, 5e5);
    let new = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}});
    assert_eq!(theta(new)?, 5e5);
    let both =
        json!({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}});
    assert!(error(theta(both)).contains("rope_theta is 10000, in rope_parameters it is 500000"));
    for kind in ["yarn", "linear", "dynamic", "longrope"] {
        for key in ["rope_parameters", "rope_scaling"] {
            let scaled = json!({key: {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}});
            let error = error(theta(scaled));
            let expected = format!("{key} is of type `{kind}`");
            assert!(error.contains(&expected), "{error}");
        }
    }
    let partial =
        json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}});
    assert!(error(theta(partial)).contains("partial_rotary_factor"));
    Ok(())
}

#[test]
fn a_field_that_changes_what_a_model_computes_is_read_or_refused() -> Result<()> {
    let with = |key: &str, value: Value| {
        let mut config = configurations()[0].clone();
        config[key] = value;
        Config::from_json(&config.to_string())
    };
    for (key, value) in [
        (
            "quantization_config",
            json!({"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ),
        (
            "quantization_config",
            json!({"quant_method": "compressed-tensors"}),
        ),
        (
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
        ),
        ("logit_scale", json!(0.25)),
        ("embedding_multiplier", json!(12)),
        ("pretraining_tp", json!(2)),
        ("use_qk_norm", json!(true)),
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
    ] {
        let error = error(with(key, value));
        assert!(error.contains(key), "{key}: {error}");
    }
    for (key, value) in [
        ("logit_scale", json!(null)),
        ("use_qk_norm", json!(false)),
        ("layer_types", json!(["full_attention", "full_attention"])),
        ("initializer_range", json!(0.02)),
    ] {
        with(key, value)?;
    }
    Ok(())
}

#[test]
fn a_model_of_what_is_no_number_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    write_folder(folder.path(), &configurations()[0]);
    let mut all = tensors(&configurations()[0]);
    let name = "model.layers.1.mlp.down_proj.weight";
    for value in [f32::NAN, f32::NEG_INFINITY] {
        let mut rows = tensors(&configurations()[0])[name].to_vec2::<f32>()?;
        rows[2][1] = value;
        all.insert(name.into(), Tensor::new(rows, &CPU)?);
        candle_core::safetensors::save(&all, folder.path().join("model.safetensors"))?;
        let error = error(Weights::open(folder.path(), false, &CPU));
        assert!(
            error.contains(name) && error.contains("index 193"),
            "{error}"
        );
    }
    Ok(())
}

#[test]
fn a_head_beside_a_flag_that_ties_it_counts_where_it_differs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = &configurations()[1];
    write_folder(folder.path(), config);
    let mut all = tensors(config);
    let table = all["model.embed_tokens.weight"].clone();
    for (head, tied) in [(table.clone(), true), ((table * 2.)?, false)] {
        all.insert("lm_head.weight".into(), head);
        candle_core::safetensors::save(&all, folder.path().join("model.safetensors"))?;
        let weights = Weights::open(folder.path(), false, &CPU)?;
        assert_eq!(weights.config.tied, tied);
        assert_eq!(weights.contains("lm_head.weight"), !tied);
    }
    Ok(())
}

fn edited(folder: &Path, file: &str, edit: impl FnOnce(&mut Value)) {
    let path = folder.join(file);
    let mut json = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap(),
        Err(_) => json!({}),
    };
    edit(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn lengths_in_a_tokenizer_json_do_not_reach_a_text() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (weights, plain) = model_folder(folder.path())?;
    edited(folder.path(), "tokenizer.json", |json| {
        json["truncation"] =
            json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 257, "pad_type_id": 0, "pad_token": "</s>"});
    });
    let text = Text::open(&weights)?;
    assert_eq!(text.encode("hello there")?, plain.encode("hello there")?);
    assert_eq!(text.encode("hello there")?.len(), 11);
    Ok(())
}

#[test]
fn tokens_around_a_text_come_from_the_flags_or_the_post_processor() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (weights, _) = model_folder(folder.path())?;
    let around = |json: &mut Value| {
        json["post_processor"] = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]},
                "<|im_end|>": {"id": "<|im_end|>", "ids": [259], "tokens": ["<|im_end|>"]}}});
    };
    assert!(Text::open(&weights)?.begin.is_empty());
    edited(folder.path(), "tokenizer.json", around);
    let text = Text::open(&weights)?;
    assert_eq!((text.begin.as_slice(), text.ends[0]), (&[256][..], 259));
    assert_eq!(text.prompt("a")?[0], 256);
    // Flags that are there count, and the older file of names is read.
    edited(folder.path(), "special_tokens_map.json", |json| {
        *json = json!({"bos_token": {"content": "<|im_start|>"}, "eos_token": "</s>"});
    });
    for (flag, expected) in [(true, vec![258]), (false, vec![])] {
        edited(folder.path(), "tokenizer_config.json", |json| {
            *json = json!({"add_bos_token": flag});
        });
        let text = Text::open(&weights)?;
        assert_eq!((text.begin, text.ends[0]), (expected, 257), "{flag}");
    }
    Ok(())
}

#[test]
fn chat_templates_are_run_as_transformers_runs_them() -> Result<()> {
    let names = BTreeMap::from([("bos_token".to_string(), "<s>".to_string())]);
    let messages = [
        Message::user(" hi\n"),
        Message {
            role: "assistant".into(),
            content: "yo".into(),
        },
    ];
    for (source, expected) in [
        (
            "{% for m in messages %}\n{{ m.content }}|\n{% endfor %}\nend",
            " hi\n|\nyo|\nend",
        ),
        ("a\n    {% if true %}b{% endif %}", "a\nb"),
        (
            "{% for m in messages %}{{ m.get('x', 'none') }}{{ m.keys()|list|length }}{% endfor %}",
            "none2none2",
        ),
        (
            "{% for m in messages %}{% for k, v in m.items() %}{{ k }} {% endfor %}{% endfor %}",
            "role content role content ",
        ),
        (
            "{{ messages[0].content.strip().title() }}{{ messages[1].content.split('o')[0] }}",
            "Hiy",
        ),
        (
            "{{ 'a b  c'.split()|length }}{{ 'abc'.find('c') }}{{ 'abc'.replace('b', '-') }}",
            "32a-c",
        ),
        (
            "{{ messages[::-1][0].content }}{{ bos_token }}{{ eos_token }}",
            "yo<s>",
        ),
        (
            "x{% generation %}y{% endgeneration %}z{%- generation -%} w {%- endgeneration -%}",
            "xyzw",
        ),
        (
            "{{ messages[0] | tojson }}",
            r#"{"role": "user", "content": " hi\n"}"#,
        ),
        (
            "{{ {'a': ['<é>']} | tojson(indent=2) }}",
            "{\n  \"a\": [\n    \"<é>\"\n  ]\n}",
        ),
        (
            "{% if tools is not none %}tools{% endif %}{{ documents is none }}",
            "True",
        ),
        (
            "{% for m in messages %}{% if loop.index0 > 0 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
            "user",
        ),
    ] {
        let text = Template::new(source)?.render(&messages, false, &names)?;
        assert_eq!(text, expected, "{source}");
    }
    let year = Template::new("{{ strftime_now('%Y') }}")?.render(&messages, false, &names)?;
    assert!(year.parse::<u32>()? >= 2026, "{year}");
    let raised = Template::new("{{ raise_exception('no system') }}")?;
    assert!(error(raised.render(&messages, false, &names)).contains("no system"));

    let list = json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]);
    assert_eq!(Template::of_setting(&list)?.unwrap().source(), "y");
    let list = json!([{"name": "rag", "template": "x"}]);
    assert!(error(Template::of_setting(&list)).contains("`default`"));
    assert!(error(Template::of_setting(&json!(3))).contains("`chat_template` is 3"));
    Ok(())
}

#[test]
fn a_tokenizer_of_another_model_beside_a_gguf_file_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("model.gguf");
    crate::small::write_gguf(
        &file,
        &configurations()[0],
        candle_core::quantized::GgmlDType::F32,
    )?;
    write_tokenizer(folder.path());
    let weights = Weights::open(&file, false, &CPU)?;
    assert_eq!(weights.stored("model.norm.weight")?.dtype(), DType::F32);
    let error = error(Text::open(&weights));
    assert!(
        error.contains(
            "the tokenizer of another model: its token 0 is `!`, the GGUF file's is `t0`"
        ),
        "{error}"
    );
    Ok(())
}
