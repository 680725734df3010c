//! Text to tokens and back, with the special tokens that a model was trained with.

use super::gguf::integer;
use super::gguf_tokenizer;
use super::template::{Message, Template};
use super::weights::Weights;
use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::quantized::gguf_file::Value;
use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind::NotFound;
use std::path::Path;
use tokenizers::Tokenizer;

/// Bytes of text that are tokenized at a time: the tokenizer needs more than a hundred for each.
const PIECE: usize = 1 << 16;

/// A tokenizer, its chat template, and the tokens that begin and end a text.
pub struct Text {
    tokenizer: Tokenizer,
    template: Option<Template>,
    /// Names of special tokens that templates ask for, by their keys in a `tokenizer_config.json`.
    names: BTreeMap<String, String>,
    /// What stands before a text that no template was applied to.
    pub begin: Vec<u32>,
    /// Tokens that end a text; the first is put behind one.
    pub ends: Vec<u32>,
    end_of_turn: Option<u32>,
}

impl Text {
    /// The tokenizer of a model: `tokenizer.json` beside it, else the metadata of its GGUF file.
    ///
    /// # Errors
    ///
    /// A `tokenizer.json` beside a GGUF file that has other tokens than the file itself.
    pub fn open(weights: &Weights) -> Result<Self> {
        let folder = match weights.path.is_dir() {
            true => weights.path.as_path(),
            false => weights.path.parent().unwrap_or(Path::new(".")),
        };
        let file = folder.join("tokenizer.json");
        let of_gguf = !weights.metadata.is_empty();
        let mut tokenizer = match file.exists() {
            true => read(&file).with_context(|| file.display().to_string())?,
            false if of_gguf => gguf_tokenizer::read(&weights.metadata)?,
            false => bail!("{} is missing", file.display()),
        };
        if of_gguf && file.exists() {
            check_tokens(&tokenizer, &weights.metadata, &file)?;
        }
        // Left behind by the call before a `tokenizer.json` was saved; lengths are this program's matter.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|e| anyhow!("{e}"))?;
        match of_gguf {
            false => Self::of_folder(tokenizer, folder),
            true => Self::of_gguf(tokenizer, &weights.metadata),
        }
    }

    fn of_folder(tokenizer: Tokenizer, folder: &Path) -> Result<Self> {
        let read = |name: &str| -> Result<serde_json::Value> {
            match std::fs::read(folder.join(name)) {
                Ok(bytes) => serde_json::from_slice(&bytes).context(name.to_string()),
                Err(error) if error.kind() == NotFound => Ok(serde_json::Value::Null),
                Err(error) => Err(error).context(name.to_string()),
            }
        };
        let config = read("tokenizer_config.json")?;
        let mut ends: Vec<u32> = Vec::new();
        for file in ["generation_config.json", "config.json"] {
            let ids = &read(file)?["eos_token_id"];
            let listed = ids.as_array().into_iter().flatten();
            let listed = listed.chain((!ids.is_null() && !ids.is_array()).then_some(ids));
            for id in listed {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                ends.push(id.with_context(|| format!("{file}: eos_token_id is no token"))?);
            }
        }
        let mut names = BTreeMap::new();
        // The older file of the two; what the newer one says is put over it.
        for settings in [&read("special_tokens_map.json")?, &config] {
            for (key, value) in settings.as_object().into_iter().flatten() {
                let content = value.get("content").unwrap_or(value);
                if let (true, Some(name)) = (key.ends_with("_token"), content.as_str()) {
                    names.insert(key.clone(), name.to_string());
                }
            }
        }
        let of = |key: &str| names.get(key).and_then(|name| tokenizer.token_to_id(name));
        ends.extend(of("eos_token"));
        let flag = |key: &str| match &config[key] {
            serde_json::Value::Null => Ok(None),
            value => {
                let flag = value.as_bool();
                let flag = flag.with_context(|| format!("tokenizer_config.json: {key} is {value}"));
                flag.map(Some)
            }
        };
        let (begins, ended) = (flag("add_bos_token")?, flag("add_eos_token")?);
        // A flag that is there takes the place of what tokenizer.json says, as in transformers.
        let (begin, end) = match (begins, ended) {
            (None, None) => around(&tokenizer)?,
            _ => {
                let begin = begins == Some(true);
                let end = ended == Some(true);
                let of = |key, added| of(key).into_iter().filter(move |_| added).collect();
                (of("bos_token", begin), of("eos_token", end))
            }
        };
        ends.splice(0..0, end);
        let template = match std::fs::read_to_string(folder.join("chat_template.jinja")) {
            Ok(template) => Some(Template::new(&template).context("chat_template.jinja")?),
            Err(error) if error.kind() == NotFound => {
                let setting = Template::of_setting(&config["chat_template"]);
                setting.context("tokenizer_config.json")?
            }
            Err(error) => return Err(error).context("chat_template.jinja"),
        };
        Self::new(tokenizer, template, names, begin, ends)
    }

    fn of_gguf(tokenizer: Tokenizer, metadata: &HashMap<String, Value>) -> Result<Self> {
        let get = |key: &str| metadata.get(&format!("tokenizer.ggml.{key}"));
        let id = |key: &str| -> Result<Option<u32>> {
            let Some(value) = get(key) else {
                return Ok(None);
            };
            let id = integer(value).and_then(|id| u32::try_from(id).ok());
            id.with_context(|| format!("the GGUF file's {key} is no token"))
                .map(Some)
        };
        let (bos, eos) = (id("bos_token_id")?, id("eos_token_id")?);
        let mut names = BTreeMap::new();
        for (key, id) in [("bos_token", bos), ("eos_token", eos)] {
            if let Some(name) = id.and_then(|id| tokenizer.id_to_token(id)) {
                names.insert(key.to_string(), name);
            }
        }
        let begins = match get("add_bos_token") {
            None => gguf_tokenizer::begins(metadata),
            Some(Value::Bool(begins)) => *begins,
            Some(other) => bail!("the GGUF file's add_bos_token is {other:?}, expected a bool"),
        };
        let begin = bos.into_iter().filter(|_| begins).collect();
        let template = match metadata.get("tokenizer.chat_template") {
            None => None,
            Some(Value::String(template)) => Some(Template::new(template)?),
            Some(_) => bail!("the GGUF file's chat template is no text"),
        };
        let ends = [eos, id("eot_token_id")?, id("eom_token_id")?];
        let ends = ends.into_iter().flatten().collect();
        Self::new(tokenizer, template, names, begin, ends)
    }

    fn new(
        tokenizer: Tokenizer,
        template: Option<Template>,
        names: BTreeMap<String, String>,
        begin: Vec<u32>,
        ends: Vec<u32>,
    ) -> Result<Self> {
        let mut distinct: Vec<u32> = Vec::new();
        for id in ends {
            if !distinct.contains(&id) {
                distinct.push(id);
            }
        }
        let mut text = Self {
            tokenizer,
            template,
            names,
            begin,
            end_of_turn: distinct.first().copied(),
            ends: distinct,
        };
        if let Some(turn) = text.end_of_answer() {
            text.end_of_turn = Some(turn);
        }
        Ok(text)
    }

    /// The special token that the chat template puts behind an answer, where it can show one.
    fn end_of_answer(&self) -> Option<u32> {
        const ANSWER: &str = "0";
        let answer = Message {
            role: "assistant".into(),
            content: ANSWER.into(),
        };
        let messages = [Message::user("?"), answer];
        let template = self.template.as_ref()?;
        let text = template.render(&messages, false, &self.names).ok()?;
        let (_, after) = text.rsplit_once(ANSWER)?;
        let special = self.tokenizer.get_added_tokens_decoder();
        let ids = self.encode(after).ok()?;
        let is_special = |id: &u32| special.get(id).is_some_and(|token| token.special);
        ids.into_iter().find(is_special)
    }

    /// The tokens of a text, special tokens in it recognised, none added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut rest = text;
        while rest.len() > PIECE {
            let Some(cut) = self.cut(rest)? else { break };
            ids.extend(encode(&self.tokenizer, &rest[..cut])?);
            rest = &rest[cut..];
        }
        ids.extend(encode(&self.tokenizer, rest)?);
        Ok(ids)
    }

    /// Where a long text can be cut between two lines without changing a token.
    fn cut(&self, text: &str) -> Result<Option<usize>> {
        let bytes = text.as_bytes();
        let plain = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let ends = (PIECE..bytes.len()).filter(|at| bytes[*at] == b'\n');
        let clear = ends.filter(|at| plain(bytes.get(at - 1)) && plain(bytes.get(at + 1)));
        const NEAR: usize = 64;
        for at in clear.take(8) {
            let cut = at + 1;
            let start = boundary(text, cut - NEAR);
            let end = boundary(text, (cut + NEAR).min(text.len()));
            let mut parts = encode(&self.tokenizer, &text[start..cut])?;
            parts.extend(encode(&self.tokenizer, &text[cut..end])?);
            if parts == encode(&self.tokenizer, &text[start..end])? {
                return Ok(Some(cut));
            }
        }
        Ok(None)
    }

    /// The text of tokens, special ones left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let text = self.tokenizer.decode(ids, true);
        text.map_err(|e| anyhow!("cannot decode: {e}"))
    }

    /// The tokenizer as a `tokenizer.json`.
    pub fn json(&self) -> Result<String> {
        let json = self.tokenizer.to_string(true);
        json.map_err(|e| anyhow!("the tokenizer: {e}"))
    }

    /// What a `tokenizer_config.json` has to say beside it.
    pub fn settings(&self) -> serde_json::Value {
        let mut settings = serde_json::json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": !self.begin.is_empty(),
        });
        if let Some(template) = &self.template {
            settings["chat_template"] = template.source().into();
        }
        for (key, name) in &self.names {
            settings[key] = name.clone().into();
        }
        settings
    }

    /// A prompt as the model expects it, up to where its answer begins: through its chat template where
    /// it has one, else the prompt and a line break.
    pub fn prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        let Some(template) = &self.template else {
            let mut ids = self.begin.clone();
            ids.extend(self.encode(&format!("{prompt}\n"))?);
            return Ok(ids);
        };
        // The template writes a token to begin with itself, where it wants one.
        self.encode(&template.render(&[Message::user(prompt)], true, &self.names)?)
    }

    /// A conversation through the chat template, up to where the model's next turn begins.
    #[allow(dead_code, reason = "for the tests; the programs ask one question")]
    pub fn chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let template = self.template.as_ref().context("no chat template")?;
        self.encode(&template.render(messages, true, &self.names)?)
    }

    /// The tokens of a conversation, and for each whether the model is to learn it: what stands in the
    /// turns of the assistant, up to the token that ends each.
    pub fn conversation(&self, messages: &[Message]) -> Result<(Vec<u32>, Vec<bool>)> {
        let template = self.template.as_ref();
        let template = template.context(
            "`messages` needs a chat template, and the model has none; give `prompt` and `completion`",
        )?;
        let (mut ids, mut learned) = (Vec::new(), Vec::new());
        for (part, answered) in template.parts(messages, &self.names)? {
            let part = self.encode(&part)?;
            let end = part.iter().position(|id| Some(*id) == self.end_of_turn);
            let last = end.map_or(part.len(), |end| end + 1);
            learned.extend((0..part.len()).map(|at| answered && at < last));
            ids.extend(part);
        }
        Ok((ids, learned))
    }

    /// The token that ends an answer: the one that the chat template closes a turn with, else the end
    /// of the text.
    pub fn end_of_turn(&self) -> Option<u32> {
        self.end_of_turn
    }
}

/// A `tokenizer.json`. The crate's own reader panics on one that is cut short.
fn read(file: &Path) -> Result<Tokenizer> {
    let bytes = std::fs::read(file)?;
    let json: serde_json::Value = serde_json::from_slice(&bytes).context("not JSON")?;
    ensure!(json.is_object(), "expected a JSON object");
    Tokenizer::from_bytes(&bytes).map_err(|e| anyhow!("{e}"))
}

/// The last place up to `at` where a character begins.
fn boundary(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode_fast(text, false);
    let encoding = encoding.map_err(|e| anyhow!("cannot tokenize: {e}"))?;
    Ok(encoding.get_ids().to_vec())
}

/// What the post-processor of a `tokenizer.json` puts before and behind a text.
fn around(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    const SAMPLE: &str = "a";
    let bare = encode(tokenizer, SAMPLE)?;
    let whole = tokenizer.encode_fast(SAMPLE, true);
    let whole = whole.map_err(|e| anyhow!("cannot tokenize: {e}"))?;
    let whole = whole.get_ids();
    let at = whole
        .windows(bare.len().max(1))
        .position(|part| part == bare);
    let at = at.context("tokenizer.json: its post-processor changes the tokens of a text")?;
    Ok((whole[..at].to_vec(), whole[at + bare.len()..].to_vec()))
}

/// Two models in one folder share its `tokenizer.json`, which belongs to one of them at most.
fn check_tokens(
    tokenizer: &Tokenizer,
    metadata: &HashMap<String, Value>,
    file: &Path,
) -> Result<()> {
    let Some(Value::Array(tokens)) = metadata.get("tokenizer.ggml.tokens") else {
        return Ok(());
    };
    let mut found = 0;
    for (id, token) in (0u32..).zip(tokens) {
        let Value::String(token) = token else {
            bail!("the GGUF file's token {id} is no text");
        };
        match tokenizer.id_to_token(id) {
            // A GGUF file fills its list up to the rows of the embedding.
            None => continue,
            Some(other) => ensure!(
                other == *token,
                "{} is the tokenizer of another model: its token {id} is `{other}`, the GGUF file's is \
                 `{token}`; move one of the two to a folder of its own",
                file.display()
            ),
        }
        found += 1;
    }
    let known = tokenizer.get_vocab_size(true);
    ensure!(
        found == known,
        "{} is the tokenizer of another model: it has {known} tokens, of which the GGUF file knows {found}; \
         move one of the two to a folder of its own",
        file.display()
    );
    Ok(())
}
