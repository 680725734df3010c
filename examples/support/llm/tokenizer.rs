//! Text to tokens and back, and a conversation to the text that the model was trained on.

use super::weights::Weights;
use anyhow::{Context, Result, anyhow, bail, ensure};
use candle_core::quantized::gguf_file::Value;
use std::collections::HashMap;
use std::io::ErrorKind::NotFound;
use std::path::Path;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
};

/// Splits of Llama 3's and Qwen2's tokenizers, as their `tokenizer.json` files have them.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A tokenizer, its chat template, and the tokens that end a text.
pub struct Text {
    tokenizer: Tokenizer,
    template: Option<String>,
    /// Names of special tokens that templates ask for.
    names: HashMap<&'static str, String>,
    pub begin: Option<u32>,
    pub ends: Vec<u32>,
}

impl Text {
    /// The tokenizer of a model: `tokenizer.json` beside it, else the metadata of its GGUF file.
    pub fn open(weights: &Weights) -> Result<Self> {
        let folder = match weights.path.is_dir() {
            true => weights.path.as_path(),
            false => weights.path.parent().unwrap_or(Path::new(".")),
        };
        let file = folder.join("tokenizer.json");
        let mut tokenizer = match file.exists() {
            true => Tokenizer::from_file(&file).map_err(|e| anyhow!("{}: {e}", file.display()))?,
            false if weights.metadata.is_empty() => bail!("{} is missing", file.display()),
            false => from_gguf(&weights.metadata)?,
        };
        // Left behind by the call before a `tokenizer.json` was saved; lengths are this program's matter.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|e| anyhow!("{e}"))?;
        match weights.metadata.is_empty() {
            true => Self::of_folder(tokenizer, folder),
            false => Self::of_gguf(tokenizer, &weights.metadata),
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
        let (config, generation) = (
            read("tokenizer_config.json")?,
            read("generation_config.json")?,
        );
        let model = read("config.json")?;
        let text = |value: &serde_json::Value| {
            let content = value.get("content").unwrap_or(value);
            content.as_str().map(str::to_string)
        };
        let mut ends: Vec<u32> = Vec::new();
        for ids in [&generation["eos_token_id"], &model["eos_token_id"]] {
            let listed = ids.as_array().into_iter().flatten();
            let listed = listed.chain(ids.is_u64().then_some(ids));
            ends.extend(listed.filter_map(|id| id.as_u64()).map(|id| id as u32));
        }
        let mut names = HashMap::new();
        for key in ["bos_token", "eos_token"] {
            if let Some(name) = text(&config[key]) {
                names.insert(key, name);
            }
        }
        let of = |key: &str| names.get(key).and_then(|name| tokenizer.token_to_id(name));
        ends.extend(of("eos_token"));
        ends.dedup();
        let adds_begin = config["add_bos_token"].as_bool().unwrap_or(false);
        let template = config["chat_template"].as_str().map(str::to_string);
        let file = match std::fs::read_to_string(folder.join("chat_template.jinja")) {
            Ok(template) => Some(template),
            Err(error) if error.kind() == NotFound => None,
            Err(error) => return Err(error).context("chat_template.jinja"),
        };
        Ok(Self {
            begin: if adds_begin { of("bos_token") } else { None },
            template: file.or(template),
            names,
            ends,
            tokenizer,
        })
    }

    fn of_gguf(tokenizer: Tokenizer, metadata: &HashMap<String, Value>) -> Result<Self> {
        let id = |key: &str| match metadata.get(&format!("tokenizer.ggml.{key}")) {
            Some(Value::U32(id)) => Some(*id),
            _ => None,
        };
        let mut names = HashMap::new();
        for (key, id) in [
            ("bos_token", id("bos_token_id")),
            ("eos_token", id("eos_token_id")),
        ] {
            if let Some(name) = id.and_then(|id| tokenizer.id_to_token(id)) {
                names.insert(key, name);
            }
        }
        let adds_begin = metadata.get("tokenizer.ggml.add_bos_token");
        let adds_begin = matches!(adds_begin, Some(Value::Bool(true)));
        let template = match metadata.get("tokenizer.chat_template") {
            Some(Value::String(template)) => Some(template.clone()),
            _ => None,
        };
        let ends = [id("eos_token_id"), id("eot_token_id")];
        Ok(Self {
            begin: if adds_begin { id("bos_token_id") } else { None },
            ends: ends.into_iter().flatten().collect(),
            template,
            names,
            tokenizer,
        })
    }

    /// The tokens of a text, special tokens in it recognised, none added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, false);
        let encoding = encoding.map_err(|e| anyhow!("cannot tokenize: {e}"))?;
        Ok(encoding.get_ids().to_vec())
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
            "add_bos_token": self.begin.is_some(),
        });
        if let Some(template) = &self.template {
            settings["chat_template"] = template.clone().into();
        }
        for (key, name) in &self.names {
            settings[*key] = name.clone().into();
        }
        settings
    }

    /// A prompt as the model expects it, up to where its answer begins: through its chat template where
    /// it has one, else the prompt and a line break.
    pub fn prompt(&self, prompt: &str) -> Result<Vec<u32>> {
        let Some(template) = &self.template else {
            let mut ids: Vec<u32> = self.begin.into_iter().collect();
            ids.extend(self.encode(&format!("{prompt}\n"))?);
            return Ok(ids);
        };
        let mut environment = minijinja::Environment::new();
        // Templates are written for Python, with its methods on strings.
        environment.set_unknown_method_callback(python_method);
        environment.add_function("raise_exception", |text: String| -> Result<String, _> {
            Err(minijinja::Error::new(
                minijinja::ErrorKind::InvalidOperation,
                text,
            ))
        });
        environment
            .add_template("chat", template)
            .context("the chat template")?;
        let message = serde_json::json!([{"role": "user", "content": prompt}]);
        let mut context = serde_json::json!({
            "messages": message,
            "add_generation_prompt": true,
            "enable_thinking": false,
        });
        for (key, name) in &self.names {
            context[*key] = name.clone().into();
        }
        let text = environment.get_template("chat")?.render(context);
        // The template writes a token to begin with itself, where it wants one.
        self.encode(&text.context("the chat template")?)
    }

    /// The token that ends an answer: the one that the chat template closes a turn with, else the end
    /// of the text.
    pub fn end_of_turn(&self) -> Option<u32> {
        let turn = ["<|im_end|>", "<|eot_id|>"];
        let mut turns = turn.iter().filter(|name| {
            let used = self.template.as_ref();
            used.is_some_and(|template| template.contains(**name))
        });
        let named = turns
            .next()
            .and_then(|name| self.tokenizer.token_to_id(name));
        named.or(self.ends.first().copied())
    }
}

/// The few methods of Python's strings that chat templates call.
fn python_method(
    _: &minijinja::State,
    value: &minijinja::Value,
    method: &str,
    arguments: &[minijinja::Value],
) -> Result<minijinja::Value, minijinja::Error> {
    let unknown = || minijinja::Error::from(minijinja::ErrorKind::UnknownMethod);
    let text = value.as_str().ok_or_else(unknown)?;
    let argument = arguments.first().and_then(|a| a.as_str());
    Ok(match (method, argument) {
        ("strip", None) => text.trim().into(),
        ("lstrip", None) => text.trim_start().into(),
        ("rstrip", None) => text.trim_end().into(),
        ("strip", Some(set)) => text.trim_matches(|c| set.contains(c)).into(),
        ("lstrip", Some(set)) => text.trim_start_matches(|c| set.contains(c)).into(),
        ("rstrip", Some(set)) => text.trim_end_matches(|c| set.contains(c)).into(),
        ("startswith", Some(start)) => text.starts_with(start).into(),
        ("endswith", Some(end)) => text.ends_with(end).into(),
        ("upper", None) => text.to_uppercase().into(),
        ("lower", None) => text.to_lowercase().into(),
        ("split", Some(by)) => text
            .split(by)
            .map(minijinja::Value::from)
            .collect::<Vec<_>>()
            .into(),
        _ => return Err(unknown()),
    })
}

/// The tokenizer that a GGUF file describes. candle reads such files too, but takes every split it does
/// not know for that of GPT-2: SmolLM's digits then come out as other tokens.
fn from_gguf(metadata: &HashMap<String, Value>) -> Result<Tokenizer> {
    let get = |key: &str| {
        let key = format!("tokenizer.ggml.{key}");
        metadata
            .get(&key)
            .with_context(|| format!("the GGUF file lacks `{key}`"))
    };
    let model = get("model")?.to_string()?;
    ensure!(
        model == "gpt2",
        "the GGUF file has a tokenizer of the kind `{model}`, which is not supported: put the model's \
         tokenizer.json beside it"
    );
    let strings = |key: &str| -> Result<Vec<String>> {
        let list = get(key)?.to_vec()?;
        list.iter().map(|v| Ok(v.to_string()?.clone())).collect()
    };
    let tokens = strings("tokens")?;
    let vocabulary: Vocab = tokens.iter().cloned().zip(0u32..).collect();
    let merges = strings("merges")?;
    let merges = merges.iter().map(|merge| match merge.split_once(' ') {
        Some((a, b)) => Ok((a.to_string(), b.to_string())),
        None => bail!("the GGUF file has a merge `{merge}`"),
    });
    let merges = merges.collect::<Result<Vec<_>>>()?;
    let pre = get("pre")?.to_string()?.as_str();
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        // Llama 3 takes a whole word that is a token before it merges.
        .ignore_merges(matches!(pre, "llama-bpe" | "llama3"))
        .build()
        .map_err(|e| anyhow!("the GGUF file's tokenizer: {e}"))?;
    let mut tokenizer = Tokenizer::new(bpe);
    let (normalizer, split) = pre_tokenizer(pre)?;
    let failed = |e| anyhow!("the GGUF file's tokenizer: {e}");
    tokenizer.with_normalizer(normalizer).map_err(failed)?;
    tokenizer.with_pre_tokenizer(Some(split));
    tokenizer.with_decoder(Some(ByteLevelDecoder::default()));
    if let Ok(kinds) = get("token_type") {
        // 3 is a control token, 4 one that a user defined.
        let kinds = kinds.to_vec()?;
        let added = tokens.iter().zip(kinds).filter_map(|(token, kind)| {
            let kind = match kind {
                Value::I32(kind) => *kind,
                Value::U32(kind) => *kind as i32,
                _ => 0,
            };
            let special = kind == 3;
            (special || kind == 4).then(|| AddedToken::from(token.clone(), special))
        });
        tokenizer.add_tokens(added).map_err(failed)?;
    }
    Ok(tokenizer)
}

/// How a tokenizer cuts text before it merges, by the name that GGUF files have for it.
fn pre_tokenizer(name: &str) -> Result<(Option<NormalizerWrapper>, PreTokenizerWrapper)> {
    let split = |regex: &str| -> Result<PreTokenizerWrapper> {
        let pattern = SplitPattern::Regex(regex.to_string());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        let split = split.map_err(|e| anyhow!("a split: {e}"))?;
        let bytes = ByteLevel::new(false, true, false);
        Ok(Sequence::new(vec![split.into(), bytes.into()]).into())
    };
    let plain = ByteLevel::new(false, true, true);
    Ok(match name {
        // Each digit stands alone, then GPT-2's split.
        "smollm" => {
            let parts = vec![Digits::new(true).into(), plain.into()];
            (None, Sequence::new(parts).into())
        }
        "gpt-2" | "gpt2" => (None, plain.into()),
        "llama-bpe" | "llama3" => (None, split(LLAMA3)?),
        "qwen2" => (Some(NFC.into()), split(QWEN2)?),
        other => bail!(
            "the GGUF file cuts text by `{other}`, which is not known here: put the model's \
             tokenizer.json beside it"
        ),
    })
}
