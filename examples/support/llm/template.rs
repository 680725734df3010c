//! From a conversation to the text that a model was trained on: chat templates as transformers runs them.

use anyhow::{Context, Result, bail, ensure};
use minijinja::{Environment, Error, ErrorKind, Value};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::collections::BTreeMap;
use std::io::{self, Write};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

impl Message {
    pub fn user(content: &str) -> Self {
        Self {
            role: "user".into(),
            content: content.into(),
        }
    }
}

/// The chat template of a model.
pub struct Template {
    environment: Environment<'static>,
    source: String,
}

const NAME: &str = "chat";

impl Template {
    pub fn new(source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        // The settings and functions that templates are written for.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |text: String| -> Result<(), Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_function("strftime_now", now);
        // The tags tell transformers which part of a text the model wrote; they print nothing.
        let tag = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")?;
        let plain = tag.replace_all(source, |found: &regex::Captures| {
            let name = match found.get(2) {
                Some(_) => "endif",
                None => "if true",
            };
            format!("{{%{} {name} {}%}}", &found[1], &found[3])
        });
        environment
            .add_template_owned(NAME, plain.into_owned())
            .context("the chat template")?;
        Ok(Self {
            environment,
            source: source.to_string(),
        })
    }

    /// The `chat_template` of a `tokenizer_config.json`: a text, or a list of named ones, of which
    /// `default` is the one to talk with.
    pub fn of_setting(setting: &serde_json::Value) -> Result<Option<Self>> {
        let text = match setting {
            serde_json::Value::Null => return Ok(None),
            serde_json::Value::String(text) => text,
            serde_json::Value::Array(named) => {
                let default = named.iter().find(|t| t["name"] == "default");
                let text = default.and_then(|t| t["template"].as_str());
                text.context("`chat_template` is a list without one that is named `default`")?
            }
            other => bail!("`chat_template` is {other}, expected a text or a list of named texts"),
        };
        Self::new(text).map(Some)
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation; with `answer` up to where the model's next turn begins. `names` are
    /// the special tokens that a template asks for, such as `bos_token`.
    pub fn render(
        &self,
        messages: &[Message],
        answer: bool,
        names: &BTreeMap<String, String>,
    ) -> Result<String> {
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (key, name) in names {
            context.insert(key, name.into());
        }
        context.insert("messages", Value::from_serialize(messages));
        context.insert("add_generation_prompt", answer.into());
        context.insert("tools", ().into());
        context.insert("documents", ().into());
        context.insert("enable_thinking", false.into());
        let template = self.environment.get_template(NAME)?;
        template.render(context).context("the chat template")
    }

    /// A conversation in parts, and for each whether the model wrote it.
    pub fn parts(
        &self,
        messages: &[Message],
        names: &BTreeMap<String, String>,
    ) -> Result<Vec<(String, bool)>> {
        let mut parts = Vec::new();
        let mut shown = String::new();
        for (turn, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let before = self.render(&messages[..turn], true, names)?;
            let after = self.render(&messages[..=turn], false, names)?;
            let (Some(asked), Some(answered)) = (
                before.strip_prefix(shown.as_str()),
                after.strip_prefix(before.as_str()),
            ) else {
                bail!(
                    "the chat template changes what stands before message {} when it is added; give \
                     `prompt` and `completion`",
                    turn + 1
                );
            };
            parts.push((asked.to_string(), false));
            parts.push((answered.to_string(), true));
            shown = after;
        }
        ensure!(
            !parts.is_empty(),
            "`messages` has none whose role is `assistant`: there is nothing to learn"
        );
        Ok(parts)
    }
}

fn now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    let now = chrono::Local::now().format(format);
    let failed = |_| Error::new(ErrorKind::InvalidOperation, "a format that strftime lacks");
    std::fmt::write(&mut text, format_args!("{now}")).map_err(failed)?;
    Ok(text)
}

/// JSON as Python writes it: nothing is escaped for HTML, and blanks follow commas and colons.
fn to_json(value: Value, options: minijinja::value::Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Characters beyond ASCII always stay.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let failed =
        |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, "tojson").with_source(e);
    let mut bytes = Vec::new();
    match indent {
        Some(width) => {
            let blanks = vec![b' '; width];
            let formatter = PrettyFormatter::with_indent(&blanks);
            value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced)),
    }
    .map_err(failed)?;
    let text = String::from_utf8(bytes)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, "tojson").with_source(e))?;
    Ok(text.into())
}

struct Spaced;

fn comma(writer: &mut (impl Write + ?Sized), first: bool) -> io::Result<()> {
    match first {
        true => Ok(()),
        false => writer.write_all(b", "),
    }
}

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        comma(w, first)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        comma(w, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}
