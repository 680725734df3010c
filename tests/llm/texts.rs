//! Texts as other programs write them, and what becomes of them.

use crate::common::golden::golden;
use crate::common::tensors::CPU;
use crate::foreign::{copy, error};
use crate::small::model_folder;
use crate::support::llm::data::Data;
use crate::support::llm::template::{Message, Template};
use crate::support::llm::tokenizer::Text;
use crate::support::llm::weights::Weights;
use anyhow::Result;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

fn data(folder: &Path, name: &str, content: &[u8], text: &Text, length: usize) -> Result<Data> {
    let file = folder.join(name);
    std::fs::write(&file, content)?;
    Data::open(Some(&file), text, length, 0)
}

#[test]
fn texts_are_told_by_what_is_in_them() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (_, text) = model_folder(folder.path())?;
    let open = |name: &str, content: &str| data(folder.path(), name, content.as_bytes(), &text, 32);
    let lines: Vec<String> = (0..20)
        .map(|i| json!({"prompt": format!("p{i}"), "completion": "yes"}).to_string())
        .collect();
    let jsonl = lines.join("\n");
    let expected = open("a.jsonl", &jsonl)?.checksum();
    for (name, content) in [
        ("a.txt", jsonl.clone()),
        ("a.ndjson", jsonl.clone()),
        ("bom.jsonl", format!("\u{feff}{jsonl}")),
        ("bom.txt", format!("\u{feff}{jsonl}")),
        ("crlf.jsonl", jsonl.replace('\n', "\r\n")),
        ("list.json", format!("[{}]", lines.join(","))),
        ("list.txt", format!("[\n{}\n]\n", lines.join(",\n"))),
        (
            "pretty.json",
            lines
                .iter()
                .map(|line| {
                    serde_json::to_string_pretty(&serde_json::from_str::<Value>(line).unwrap())
                        .unwrap()
                })
                .collect::<Vec<_>>()
                .join("\n"),
        ),
    ] {
        let found = open(name, &content)?;
        assert_eq!(found.checksum(), expected, "{name}");
        assert!(found.notes.is_empty(), "{name}: {:?}", found.notes);
    }
    // What is beside the text is named, not trained on.
    let more = jsonl.replace(
        "{\"completion\"",
        "{\"id\": 3, \"meta\": {\"a\": 1}, \"completion\"",
    );
    let found = open("more.jsonl", &more)?;
    assert_eq!(found.checksum(), expected);
    assert_eq!(found.notes, ["`id`, `meta` of the data are not read"]);
    for (content, part) in [
        (
            r#"{"text": "a", "completion": "b"}"#,
            "`text` and `completion`",
        ),
        (
            r#"{"instruction": "a", "output": "b"}"#,
            "`prompt` and `completion`",
        ),
        (r#"{"text": ["a"]}"#, "`text` is no text"),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "text"}]}]}"#,
            "`messages`",
        ),
        (
            r#"{"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}"#,
            "`messages`",
        ),
    ] {
        for name in ["wrong.jsonl", "wrong.txt"] {
            let error = error(open(name, &format!("{content}\n{content}\n")));
            assert!(error.contains("line 1") && error.contains(part), "{error}");
        }
    }
    let broken = error(open("broken.jsonl", &format!("{jsonl}\n{{\"text\": ")));
    assert!(broken.contains("line 21"), "{broken}");
    // Text that begins as JSON does is text.
    let brace = format!("{{\\em TeX}} {}", "is text too ".repeat(20));
    assert!(open("brace.txt", &brace)?.train.len() > 4);
    let plain = "one line\nand another\n".repeat(20);
    let windows = open("crlf.txt", &plain.replace('\n', "\r\n"))?.checksum();
    assert_eq!(windows, open("lf.txt", &plain)?.checksum());
    Ok(())
}

#[test]
fn long_texts_become_windows_and_what_is_cut_is_told() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (_, text) = model_folder(folder.path())?;
    let long: String = (0..10)
        .map(|i| json!({"text": format!("document {i} {}", "x".repeat(200))}).to_string() + "\n")
        .collect();
    let found = data(folder.path(), "long.jsonl", long.as_bytes(), &text, 64)?;
    // 211 bytes and the token that ends them, in four windows each; one document is held out, whole.
    assert_eq!((found.train.len(), found.validation.len()), (36, 4));
    let tokens: usize = found.train.iter().map(|s| s.ids.len()).sum();
    assert_eq!(tokens, 9 * 212);
    assert!(found.notes.is_empty(), "{:?}", found.notes);
    let pairs: String = (0..10)
        .map(|i| {
            json!({"prompt": format!("{i}"), "completion": "y".repeat(100)}).to_string() + "\n"
        })
        .collect();
    let found = data(folder.path(), "pairs.jsonl", pairs.as_bytes(), &text, 64)?;
    let expected = "10 examples are longer than --seq 64: 390 of 1030 tokens are cut off";
    assert_eq!(found.notes, [expected]);
    Ok(())
}

#[test]
fn of_a_conversation_the_turns_of_the_assistant_are_learned() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (weights, plain) = model_folder(folder.path())?;
    let line = json!({"messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"},
        {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]});
    let lines = format!("{line}\n{line}\n");
    let refused = error(data(
        folder.path(),
        "chat.jsonl",
        lines.as_bytes(),
        &plain,
        128,
    ));
    assert!(refused.contains("chat template"), "{refused}");
    std::fs::write(folder.path().join("chat_template.jinja"), CHATML)?;
    let text = Text::open(&weights)?;
    let found = data(folder.path(), "chat.jsonl", lines.as_bytes(), &text, 128)?;
    let sequence = &found.train[0];
    let learned: Vec<u32> = (sequence.ids.iter().zip(&sequence.learned))
        .filter_map(|(id, learned)| learned.then_some(*id))
        .collect();
    assert_eq!(text.end_of_turn(), Some(259));
    assert_eq!(
        learned,
        [text.encode("bc")?, vec![259], text.encode("e")?, vec![259]].concat()
    );
    let whole = Template::new(CHATML)?;
    let messages: Vec<Message> = serde_json::from_value(line["messages"].clone())?;
    assert_eq!(
        sequence.ids,
        text.encode(&whole.render(&messages, false, &BTreeMap::new())?)?
    );
    Ok(())
}

#[test]
fn a_long_text_has_the_tokens_of_the_whole() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for name in ["llama", "qwen2", "qwen3"] {
        copy(&golden(&format!("transformers/{name}")), folder.path());
        let text = Text::open(&Weights::open(folder.path(), false, &CPU)?)?;
        let tokenizer =
            tokenizers::Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
        let long: String = (0..9000)
            .map(|i| {
                format!(
                    "the cat sat {i} miles{}",
                    ["\n", ".\n\n", "\nx", " ", "\n \n"][i % 5]
                )
            })
            .collect();
        assert!(long.len() > 200_000);
        let whole = tokenizer.encode(long.as_str(), false).unwrap();
        assert!(text.encode(&long)? == whole.get_ids(), "{name}");
    }
    Ok(())
}
