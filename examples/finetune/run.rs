//! The run: model, data, steps, and what is left behind.

use crate::setup::{
    check_memory, check_same, check_targets, identity, method, note_shares, targets,
    warn_of_another_run,
};
use crate::support::cli::{say, stop};
use crate::support::llm::data::{Batch, Data, Order, Prompt, Sequence};
use crate::support::llm::open;
use crate::support::llm::sample::{Sampling, answer};
use crate::support::llm::tokenizer::Text;
use crate::support::llm::train::{StepOptions, Team, Trainer};
use crate::support::llm::weights::Weights;
use crate::support::{files, memory, pages, progress};
use crate::{Flags, MethodName, draw, merged};
use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use candle_doft::file::save_tensors;
use candle_doft::train::parallel::{Processes, agree, any, check_replicas, lead};
use candle_doft::train::{AdamW, Checkpoint, Schedule};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What a checkpoint keeps of a run beside its variables: losses and perplexities by step.
#[derive(Serialize, Deserialize)]
struct Curves {
    losses: Vec<(u64, f64)>,
    held_out: Vec<(u64, f64)>,
}

pub(crate) fn run(flags: &Flags, group: &dyn Processes) -> Result<()> {
    lead(group, || files::make_folder(&flags.out))?;
    // The first one downloads what is on the hub.
    lead(group, || open::locate(&flags.model).map(drop))?;
    let read = agree(group, read(flags))?;
    let session = Session::new(flags, group, read);
    let mut session = agree(group, session)?;
    check_same(group, flags, &session.weights, &session.data)?;
    note_shares(group, flags);
    if let Some(optimizer) = &session.trainer.optimizer {
        check_replicas(group, optimizer)?;
    }
    if group.rank() == 0 {
        warn_of_another_run(flags, &session.checkpoint());
    }
    let prompt = match &flags.prompt {
        Some(prompt) => Prompt::new(prompt, &session.text),
        None => session.data.prompt(&session.text),
    };
    let prompt = agree(group, prompt)?;
    if session.step == 0 {
        session.show("before:", &prompt)?;
    }
    session.train()?;
    if session.stopped {
        if group.rank() == 0 {
            match session.step {
                0 => eprintln!("stopped before the first step; nothing was saved"),
                step => eprintln!("stopped after step {step}; --resume goes on from here"),
            }
        }
        return Ok(());
    }
    session.show("now:", &prompt)?;
    lead(group, || session.finish())
}

/// What a run is made of.
fn read(flags: &Flags) -> Result<(Weights, Text, Data, Device)> {
    let device = flags.device.open()?;
    let weights = Weights::open(&open::locate(&flags.model)?, flags.dequantize, &device)?;
    let text = Text::open(&weights)?;
    if let Some(folder) = &flags.merge_to {
        merged::check(folder, &weights)?;
    }
    ensure!(
        flags.seq <= weights.config.context,
        "--seq {} is more than the model's context of {}; give a smaller one",
        flags.seq,
        weights.config.context
    );
    let data = Data::open(flags.data.as_deref(), &text, flags.seq, flags.seed)?;
    check_memory(flags, &weights.config, &data)?;
    Ok((weights, text, data, device))
}

/// Milliseconds for which freed pages are kept: with more a step is faster, and the peak higher.
const KEPT: i32 = 150;

fn indented(text: &str) -> String {
    text.trim().replace('\n', "\n          ")
}

/// Steps between two lines of progress, where standard error is no terminal and shows no bar.
const TOLD: u64 = 10;

struct Session<'a> {
    flags: &'a Flags,
    group: &'a dyn Processes,
    weights: Weights,
    text: Text,
    data: Data,
    device: Device,
    trainer: Trainer,
    schedule: Schedule,
    /// Steps that were made; the position in the data follows from it.
    step: u64,
    losses: Vec<(u64, f64)>,
    held_out: Vec<(u64, f64)>,
    /// Whether this process was asked to stop, and whether all know that one was.
    stop: Arc<AtomicBool>,
    stopped: bool,
}

impl<'a> Session<'a> {
    fn new(
        flags: &'a Flags,
        group: &'a dyn Processes,
        (weights, text, data, device): (Weights, Text, Data, Device),
    ) -> Result<Self> {
        ensure!(
            flags.method != MethodName::None || group.size() == 1,
            "--method none trains nothing that {} processes could share; start one",
            group.size()
        );
        let targets = targets(flags);
        let mut trainer = Trainer::new(&weights, method(flags), flags.seed, &targets, &device)?;
        if let (Some(optimizer), MethodName::Doft) = (&mut trainer.optimizer, flags.method) {
            optimizer.set_group_rate(AdamW::MAGNITUDES, flags.magnitude_rate)?;
        }
        check_targets(flags, &trainer.model)?;
        let schedule = Schedule {
            decay: flags.decay.into(),
            warmup: flags.warmup,
            total: flags.steps as u64,
            floor: 0.,
        };
        let mut session = Self {
            flags,
            group,
            trainer,
            schedule,
            weights,
            text,
            data,
            device,
            step: 0,
            losses: Vec::new(),
            held_out: Vec::new(),
            stop: Arc::default(),
            stopped: false,
        };
        if flags.resume {
            session.resume()?;
        }
        Ok(session)
    }

    fn checkpoint(&self) -> std::path::PathBuf {
        self.flags.out.join("checkpoint.safetensors")
    }

    fn resume(&mut self) -> Result<()> {
        let file = self.checkpoint();
        ensure!(
            file.exists(),
            "{}: no such file; --resume goes on with a run of the same --out",
            file.display()
        );
        let checkpoint = Checkpoint::load(&file)?;
        let ours = identity(self.flags, &self.weights, &self.data)?;
        let theirs: Value = checkpoint.config()?;
        for (key, value) in ours.as_object().into_iter().flatten() {
            let found = &theirs[key];
            ensure!(
                found == value,
                "{}: `{key}` was {found} there and is {value} now; resume with the same flags{}",
                file.display(),
                if key == "base" {
                    " and the same model"
                } else {
                    ""
                },
            );
        }
        let Some(optimizer) = &mut self.trainer.optimizer else {
            bail!("--method none trains nothing that could be resumed");
        };
        checkpoint.restore(optimizer)?;
        self.step = checkpoint.steps();
        let Curves { losses, held_out } = checkpoint.state()?;
        (self.losses, self.held_out) = (losses, held_out);
        Ok(())
    }

    /// By the first process, when all hold the same.
    fn save(&self) -> Result<()> {
        let Some(optimizer) = &self.trainer.optimizer else {
            return Ok(());
        };
        check_replicas(self.group, optimizer)?;
        lead(self.group, || self.write(optimizer))
    }

    fn write(&self, optimizer: &AdamW) -> Result<()> {
        let identity = identity(self.flags, &self.weights, &self.data)?;
        let state = Curves {
            losses: self.losses.clone(),
            held_out: self.held_out.clone(),
        };
        Checkpoint::save(self.checkpoint(), optimizer, &identity, &state)?;
        let file = self.flags.out.join("adapter.safetensors");
        match self.trainer.tuner.adapter() {
            Some(adapter) => {
                for warning in adapter.save(&file)? {
                    eprintln!("note: {warning}");
                }
            }
            None => {
                let named = self.trainer.tuner.named_vars();
                let tensors = named
                    .iter()
                    .map(|(n, v)| (n.clone(), v.as_tensor().detach()));
                save_tensors(&file, &tensors.collect(), &Default::default())?;
            }
        }
        Ok(())
    }

    fn train(&mut self) -> Result<()> {
        let group = self.group;
        let end = self.flags.stop_after.unwrap_or(self.flags.steps) as u64;
        self.stop = agree(group, stop())?;
        let mut metrics = agree(group, self.metrics())?;
        if self.step == 0 {
            if group.rank() == 0 {
                self.announce();
            }
            self.validate(&mut metrics)?;
        }
        let bar = match group.rank() {
            0 => progress::bar(end as usize, "finetune"),
            _ => progress::none(),
        };
        bar.set_position(self.step);
        let mut order = Order::new(self.flags.seed, self.data.train.len());
        // Not before: what loading left goes back.
        pages::keep(KEPT);
        self.look_for_a_stop()?;
        while self.step < end && !self.stopped {
            let made = self.one_step(&mut order, &mut metrics)?;
            bar.set_position(self.step);
            let told = group.rank() == 0 && self.step.is_multiple_of(TOLD);
            if bar.is_hidden() && told {
                eprintln!("step {} of {end}: {made}", self.step);
            }
            bar.set_message(made.to_string());
            let due = self.step.is_multiple_of(self.flags.every as u64) && self.step < end;
            if due {
                self.validate(&mut metrics)?;
                self.save()?;
                self.look_for_a_stop()?;
            }
        }
        bar.finish_and_clear();
        self.look_for_a_stop()?;
        // Who stops a run does not want to wait for another look at the held-out text.
        if !self.stopped {
            self.validate(&mut metrics)?;
        }
        // Who stops before the first step may have meant to resume: what is in --out stays.
        if self.step == 0 {
            return Ok(());
        }
        self.save()?;
        lead(group, || {
            let title = format!("{:?}, {}", self.flags.method, name(&self.weights.path));
            let picture = draw::picture(&self.losses, &self.held_out, title)?;
            files::replace(&self.flags.out.join("loss.svg"), picture.as_bytes())
        })
    }

    /// Whether a process was asked to stop; between steps, which look themselves.
    fn look_for_a_stop(&mut self) -> Result<()> {
        self.stopped |= any(self.group, self.stop.load(Ordering::SeqCst))?;
        Ok(())
    }

    fn announce(&self) {
        let trainable = self.trainer.tuner.trainable();
        eprintln!(
            "{} layers, weights of {} MB; {trainable} parameters train; {} sequences, {} held out",
            self.weights.config.layers,
            self.weights.bytes() >> 20,
            self.data.train.len(),
            self.data.validation.len(),
        );
        for note in &self.data.notes {
            eprintln!("note: {note}");
        }
    }

    /// The file of metrics, of the first process; a resumed run keeps the lines up to its step.
    fn metrics(&self) -> Result<Metrics> {
        if self.group.rank() > 0 {
            return Ok(Metrics(None));
        }
        let file = self.flags.out.join("metrics.jsonl");
        let kept: Vec<String> = match (self.flags.resume, std::fs::read_to_string(&file)) {
            (true, Ok(text)) => {
                let known = |line: &&str| {
                    let line: Result<Value, _> = serde_json::from_str(line);
                    line.is_ok_and(|line| line["step"].as_u64() <= Some(self.step))
                };
                text.lines()
                    .filter(known)
                    .map(|l| format!("{l}\n"))
                    .collect()
            }
            _ => Vec::new(),
        };
        files::replace(&file, kept.concat().as_bytes())?;
        let open = std::fs::OpenOptions::new().append(true).open(&file);
        Ok(Metrics(Some(
            open.with_context(|| file.display().to_string())?,
        )))
    }

    fn one_step(&mut self, order: &mut Order, metrics: &mut Metrics) -> Result<Made> {
        let start = Instant::now();
        let mut batches = Vec::new();
        let drawn = (self.flags.batch * self.flags.accumulate) as u64;
        for micro in 0..self.flags.accumulate {
            let first = self.step * drawn + (micro * self.flags.batch) as u64;
            let positions = first..first + self.flags.batch as u64;
            let chosen: Vec<&Sequence> = positions
                .map(|position| &self.data.train[order.at(position)])
                .collect();
            batches.push(Batch::new(&chosen, &self.device)?);
        }
        let read: usize = batches.iter().map(|batch| batch.ids.elem_count()).sum();
        let rate = self.schedule.rate(self.flags.lr, self.step);
        let options = StepOptions {
            step: self.step,
            rate,
            clip: self.flags.clip,
            again: self.flags.checkpoint_activations,
        };
        let team = Team {
            group: self.group,
            stop: &self.stop,
        };
        let step = self.trainer.step(team, &batches, options)?;
        self.stopped |= step.stop;
        self.step += 1;
        self.losses.push((self.step, step.loss));
        let seconds = start.elapsed().as_secs_f64();
        let made = Made {
            loss: step.loss,
            rate,
            tokens_per_second: read as f64 / seconds,
            reduction: step.reduction / seconds,
        };
        let line = json!({
            "step": self.step,
            "loss": made.loss,
            "lr": made.rate,
            "seconds": seconds,
            "tokens_per_second": made.tokens_per_second,
            "reduction_seconds": step.reduction,
            "peak_rss_bytes": memory::peak_bytes(),
        });
        lead(self.group, || metrics.write(&line))?;
        Ok(made)
    }

    /// The perplexity of the held-out text, once for each step.
    fn validate(&mut self, metrics: &mut Metrics) -> Result<()> {
        if self
            .held_out
            .last()
            .is_some_and(|(step, _)| *step == self.step)
        {
            return Ok(());
        }
        let held = &self.data.validation;
        let held = &held[..held.len().min(self.flags.held_out)];
        let measured = self.trainer.held_out(self.group, held, self.flags.batch)?;
        self.held_out.push((self.step, measured));
        let line = json!({"step": self.step, "validation_perplexity": measured.exp()});
        lead(self.group, || {
            metrics.write(&line)?;
            let perplexity = measured.exp();
            eprintln!("step {}: held-out perplexity {perplexity:.3}", self.step);
            Ok(())
        })
    }

    /// Prints what the model makes of a prompt.
    fn show(&self, when: &str, prompt: &Prompt) -> Result<()> {
        lead(self.group, || self.answer(when, prompt))
    }

    fn answer(&self, when: &str, prompt: &Prompt) -> Result<()> {
        if self.flags.sample_tokens == 0 {
            return Ok(());
        }
        let sampling = Sampling {
            temperature: 0.,
            seed: self.flags.seed,
            max_tokens: self.flags.sample_tokens,
        };
        let (model, text) = (&self.trainer.model, &self.text);
        let answer = || answer(model, text, &prompt.ids, sampling, |_| Ok(()));
        let answered = self.trainer.tuner.eval(answer)?;
        say(format_args!(
            "> {}\n  {when:7} {}",
            indented(&prompt.shown),
            indented(&answered)
        ));
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        if let Some(folder) = &self.flags.merge_to {
            let kind = self.flags.merge_type.into();
            merged::write(folder, &self.weights, &self.trainer.model, &self.text, kind)?;
            say(format_args!("merged into {}", folder.display()));
        }
        say(format_args!("{}", self.flags.out.display()));
        Ok(())
    }
}

/// The file of metrics, which the first process writes.
struct Metrics(Option<std::fs::File>);

impl Metrics {
    fn write(&mut self, line: &Value) -> Result<()> {
        match &mut self.0 {
            Some(file) => writeln!(file, "{line}").context("metrics.jsonl"),
            None => Ok(()),
        }
    }
}

/// What a step came to.
struct Made {
    loss: f64,
    rate: f64,
    tokens_per_second: f64,
    /// Share of the step that was the reduction over processes.
    reduction: f64,
}

impl std::fmt::Display for Made {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            loss,
            rate,
            tokens_per_second: speed,
            reduction,
        } = self;
        let peak = memory::peak_bytes().unwrap_or(0) as f64 / 1e6;
        write!(
            f,
            "loss {loss:.3}, rate {rate:.1e}, {speed:.0} tokens/s, {peak:.0} MB"
        )?;
        match *reduction > 0. {
            true => write!(f, ", {:.1} % of it reduction", 100. * reduction),
            false => Ok(()),
        }
    }
}

fn name(path: &Path) -> String {
    path.file_name()
        .map_or(String::new(), |name| name.to_string_lossy().into())
}
