//! LoRA, DoRA, OFT and DOFT on the same tasks, each at its best learning rate.
//!
//!     cargo run --release --example compare -- --out target/compare
//!
//! Over many machines: `--shard 2/8 --out D2` on each, then `--merge D1 D2 .. --out D` and, on what that leaves,
//! `--out D`.

mod cost;
mod draw;
mod method;
mod pool;
mod record;
mod run;
mod senses;
mod shard;
mod studies;
mod summary;
#[path = "../support/mod.rs"]
mod support;
mod sweep;
mod table;
mod task;
mod text;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use method::{Entry, MAIN, Name, Wanted, entry};
use record::{Run, Store};
use serde_json::json;
use shard::Shard;
use std::path::PathBuf;
use summary::TaskSummary;
use support::cli::positive;
use support::cli::say;
use support::device::DeviceName;
use support::files;
use sweep::{Bench, Plan};
use task::{DigitsTask, Kind, Length, Task};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum TaskName {
    /// One digit, turned by 90 degrees
    Turned,
    /// Two digits, turned, mirrored, noisy and partly covered: 100 classes
    Pairs,
    /// The Devil's Dictionary, on the language model of --model
    Text,
    /// Which of WordNet's 26 noun files a gloss belongs to, on the encoder of --model
    Senses,
}

/// Adapts frozen networks with LoRA, DoRA, OFT, DOFT and full fine-tuning: the same data, batches and
/// optimizer, each method at the learning rate that is best on the validation split.
///
/// Finished runs are kept in DIR and not made again by a later call.
#[derive(Parser, Clone, Debug)]
#[command(name = "compare")]
struct Flags {
    /// Folder for compare.json, compare.md, the plots and the runs
    #[arg(long, default_value = "target/compare")]
    out: PathBuf,
    /// A short look: few steps, rates, seeds and methods
    #[arg(long)]
    quick: bool,
    /// Seeds of the sweep over learning rates [default: 5; 2 for text and with --quick]
    #[arg(long, value_parser = clap::value_parser!(u64).range(2..=1000))]
    seeds: Option<u64>,
    /// Seeds at each method's best rate, those of the sweep among them [default: 20; those of the
    /// sweep for text and with --quick]
    #[arg(long, value_parser = clap::value_parser!(u64).range(2..=1000))]
    final_seeds: Option<u64>,
    /// lora, dora, oft, doft, doft_unscaled, doft_series, doft_capped or full, at the usual sizes or
    /// with a rank or block size, as in doft:16 [default: all]
    #[arg(long, num_args = 1..)]
    methods: Vec<Wanted>,
    /// Learning rates, instead of 11 from 0.0005 to 0.512 and more where the best is not inside
    #[arg(long, num_args = 1.., value_parser = positive)]
    lrs: Vec<f64>,
    /// Tasks [default: turned and pairs; text with --model]
    #[arg(long, value_enum, num_args = 1..)]
    task: Vec<TaskName>,
    /// The language model for text: a GGUF file, a folder in Hugging Face layout, or a name on the
    /// hub. Takes many hours on a laptop. For senses: the folder of a BERT encoder
    #[arg(long)]
    model: Option<String>,
    /// Steps of a run [default: 200; 60 for text and with --quick]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    steps: Option<u32>,
    /// Runs side by side, each on one core [default: all cores]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    jobs: Option<u32>,
    /// Makes the K-th of N parts of the runs at the given rates and seeds and nothing else, for a sweep over
    /// many machines, each with an --out of its own
    #[arg(long, value_name = "K/N", conflicts_with = "merge")]
    shard: Option<Shard>,
    /// Takes in the runs of the --out of each shard, and says which rates the sweep lacks
    #[arg(long, num_args = 1.., value_name = "DIR")]
    merge: Vec<PathBuf>,
    /// Where to compute: cpu, cuda, cuda:N or metal. The runs of an --out are all of one device
    #[arg(long, default_value_t, value_name = "DEVICE")]
    device: DeviceName,
    /// Times one method in this process
    #[arg(long, hide = true)]
    probe: Option<String>,
}

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    if flags.task.contains(&TaskName::Text) && flags.model.is_none() {
        let what = "--task text needs a language model; name it with --model";
        return support::cli::wrong_arguments(what);
    }
    if flags.task.contains(&TaskName::Senses) && (flags.model.is_none() || flags.task.len() > 1) {
        let what = "--task senses is run alone, on an encoder's folder; name it with --model";
        return support::cli::wrong_arguments(what);
    }
    support::cli::run(|| match one_thread()? {
        true => run(&flags),
        false => Ok(()),
    })
}

/// Starts the program again where its kernels would take more than one thread: runs go side by side
/// instead, and candle reads the number of threads from the environment.
fn one_thread() -> Result<bool> {
    const THREADS: &str = "RAYON_NUM_THREADS";
    if std::env::var(THREADS).is_ok_and(|threads| threads == "1") {
        return Ok(true);
    }
    let program = std::env::current_exe().context("where this program lies")?;
    let mut again = std::process::Command::new(program);
    again.args(std::env::args_os().skip(1)).env(THREADS, "1");
    replace_by(again).context("cannot start with one thread")
}

/// Only comes back when it fails: the process goes on as the other program.
#[cfg(unix)]
fn replace_by(mut program: std::process::Command) -> std::io::Result<bool> {
    Err(std::os::unix::process::CommandExt::exec(&mut program))
}

#[cfg(not(unix))]
fn replace_by(mut program: std::process::Command) -> std::io::Result<bool> {
    let status = program.status()?;
    std::process::exit(status.code().unwrap_or(1))
}

fn length(flags: &Flags, kind: Kind) -> Length {
    let steps = flags.steps.unwrap_or(if flags.quick { 60 } else { 200 });
    Length {
        steps: steps as usize,
        warmup: u64::from(steps / 20),
        base_steps: match (flags.quick, kind) {
            (true, _) => 200,
            (false, Kind::Turned) => 600,
            (false, Kind::Pairs) => 1000,
        },
    }
}

fn digits(flags: &Flags, name: &str) -> Result<DigitsTask> {
    let kind = match name {
        "turned" => Kind::Turned,
        "pairs" => Kind::Pairs,
        other => bail!("there is no task `{other}` on digits"),
    };
    DigitsTask::new(kind, length(flags, kind), flags.device)
}

/// How wide to look, where the flags do not say it.
fn plan(flags: &Flags, rates: &[f64], seeds: u64, final_seeds: u64) -> Result<Plan> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let seeds = flags.seeds.unwrap_or(seeds);
    let final_seeds = flags.final_seeds.unwrap_or(seeds.max(final_seeds));
    ensure!(
        final_seeds >= seeds,
        "--final-seeds {final_seeds} is less than the {seeds} seeds of the sweep; give more"
    );
    let fixed = !flags.lrs.is_empty();
    let mut rates = if fixed {
        flags.lrs.clone()
    } else {
        rates.to_vec()
    };
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    Ok(Plan {
        extensions: if fixed || flags.quick { 0 } else { 6 },
        rates,
        seeds,
        final_seeds,
        workers: flags.jobs.map_or(cores, |jobs| jobs as usize),
    })
}

/// The methods of a task. The series is swept on the harder one alone; the capped one, whose step takes
/// three times as long, only meets the others at their rates.
fn entries(flags: &Flags, task: &DigitsTask) -> Vec<Entry> {
    let unswept = |name: Name| match name {
        Name::DoftCapped => true,
        Name::DoftSeries => task.kind != Kind::Pairs,
        _ => false,
    };
    let narrowest = task.widths()[3];
    let mut entries: Vec<Entry> = match (flags.methods.is_empty(), flags.quick) {
        (false, _) => flags.methods.iter().flat_map(Wanted::entries).collect(),
        (true, false) => Wanted::all()
            .iter()
            .flat_map(Wanted::entries)
            .filter(|entry| entry.fits(narrowest) && !unswept(entry.method))
            .collect(),
        (true, true) => MAIN.into(),
    };
    entries.sort();
    entries.dedup();
    entries
}

fn run(flags: &Flags) -> Result<()> {
    if let Some(probe) = &flags.probe {
        let (task, entry, steps): (String, Entry, usize) = serde_json::from_str(probe)?;
        return cost::probe(&digits(flags, &task)?, entry, steps);
    }
    files::make_folder(&flags.out)?;
    let start = std::time::Instant::now();
    let names = match (flags.task.is_empty(), &flags.model) {
        (false, _) => flags.task.clone(),
        (true, Some(_)) => vec![TaskName::Text],
        (true, None) => vec![TaskName::Turned, TaskName::Pairs],
    };
    if flags.shard.is_some() || !flags.merge.is_empty() {
        return names.into_iter().try_for_each(|name| part(flags, name));
    }
    let (mut runs, mut summaries) = (Vec::new(), Vec::new());
    for name in names {
        let (made, summary) = match name {
            TaskName::Turned => on_digits(flags, Kind::Turned)?,
            TaskName::Pairs => on_digits(flags, Kind::Pairs)?,
            TaskName::Text => on_text(flags)?,
            TaskName::Senses => on_senses(flags)?,
        };
        runs.extend(made);
        summaries.push(summary);
    }
    let report = json!({
        "runs": runs,
        "summary": {"tasks": summaries, "seconds": start.elapsed().as_secs_f64()},
    });
    let text = serde_json::to_string(&report)? + "\n";
    files::replace(&flags.out.join("compare.json"), text.as_bytes())?;
    for (name, picture) in draw::pictures(&summaries)? {
        files::replace(&flags.out.join(name), picture.as_bytes())?;
    }
    let tables: String = summaries.iter().map(table::table).collect();
    files::replace(&flags.out.join("compare.md"), tables.as_bytes())?;
    say(format_args!("{tables}see {}", flags.out.display()));
    Ok(())
}

/// A sweep that is made or joined in parts.
fn part(flags: &Flags, name: TaskName) -> Result<()> {
    let work = |task: &dyn Task, plan: &Plan, entries: &[Entry]| -> Result<()> {
        let bench = bench(flags, task, plan)?;
        let lines = match flags.shard {
            Some(shard) => vec![shard.make(&bench, entries)?],
            None => shard::merge(&bench, entries, &flags.merge)?,
        };
        say(format_args!("{}", lines.join("\n")));
        Ok(())
    };
    let kind = match name {
        TaskName::Turned => Kind::Turned,
        TaskName::Pairs => Kind::Pairs,
        TaskName::Text => return work(&text(flags)?, &text_plan(flags)?, &text_entries(flags)),
        TaskName::Senses => {
            let task = senses(flags)?;
            return work(&task, &senses_plan(flags)?, &text_entries(flags));
        }
    };
    let task = DigitsTask::new(kind, length(flags, kind), flags.device)?;
    work(&task, &digits_plan(flags)?, &entries(flags, &task))
}

fn bench<'a>(flags: &Flags, task: &'a dyn Task, plan: &'a Plan) -> Result<Bench<'a>> {
    let store = Store::open(&flags.out, task.name(), &task.settings())?;
    Ok(Bench { task, store, plan })
}

fn text(flags: &Flags) -> Result<text::TextTask> {
    let model = flags.model.as_deref().context("text has no --model")?;
    let steps = flags.steps.map_or(60, |steps| steps as usize);
    text::TextTask::new(model, steps, if flags.quick { 4 } else { 24 }, flags.device)
}

fn text_plan(flags: &Flags) -> Result<Plan> {
    let rates = [1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1];
    plan(flags, &rates, 2, 2)
}

fn text_entries(flags: &Flags) -> Vec<Entry> {
    let mut entries: Vec<Entry> = match flags.methods.is_empty() {
        false => flags.methods.iter().flat_map(Wanted::entries).collect(),
        // What a language model has memory and time for.
        true => MAIN[..4].into(),
    };
    entries.sort();
    entries.dedup();
    entries
}

/// The methods on the language model, at seven rates over three decades.
fn on_text(flags: &Flags) -> Result<(Vec<Run>, TaskSummary)> {
    let (task, plan) = (text(flags)?, text_plan(flags)?);
    let bench = bench(flags, &task, &plan)?;
    let entries = text_entries(flags);
    let swept = bench.sweep("text", &entries)?;
    let summary = summary::summarise(&bench, "perplexity", &swept);
    Ok((bench.store.runs(), summary))
}

fn senses(flags: &Flags) -> Result<senses::SensesTask> {
    let model = flags.model.as_deref().context("senses has no --model")?;
    let steps = flags.steps.unwrap_or(if flags.quick { 8 } else { 150 });
    senses::SensesTask::new(model, steps as usize, if flags.quick { 8 } else { 1 })
}

fn senses_plan(flags: &Flags) -> Result<Plan> {
    match flags.quick {
        true => plan(flags, &[3e-4, 3e-3], 2, 2),
        false => plan(flags, &[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], 5, 5),
    }
}

/// The methods on the encoder; each learns from the same glosses in the same order.
fn on_senses(flags: &Flags) -> Result<(Vec<Run>, TaskSummary)> {
    let (task, plan) = (senses(flags)?, senses_plan(flags)?);
    let bench = bench(flags, &task, &plan)?;
    let swept = bench.sweep("senses", &text_entries(flags))?;
    let summary = summary::summarise(&bench, "accuracy", &swept);
    Ok((bench.store.runs(), summary))
}

fn digits_plan(flags: &Flags) -> Result<Plan> {
    let rates: Vec<f64> = (0..11).map(|k| 0.0005 * f64::from(1 << k)).collect();
    match flags.quick {
        true => plan(flags, &[0.002, 0.016, 0.128], 2, 2),
        false => plan(flags, &rates, 5, 20),
    }
}

fn on_digits(flags: &Flags, kind: Kind) -> Result<(Vec<Run>, TaskSummary)> {
    let task = &DigitsTask::new(kind, length(flags, kind), flags.device)?;
    let plan = digits_plan(flags)?;
    let bench = bench(flags, task, &plan)?;
    let entries = entries(flags, task);
    let swept = bench.sweep("runs", &entries)?;
    let mut summary = summary::summarise(&bench, "accuracy", &swept);
    let doft = swept.iter().find(|s| s.entry == entry(Name::Doft, 32));
    let oft = swept.iter().find(|s| s.entry == entry(Name::Oft, 32));
    if let Some(doft) = doft {
        if task.kind == Kind::Pairs {
            summary.block_sizes = studies::by_block_size(&bench, flags.quick)?;
            summary.first_steps = studies::first_steps(&bench, task, flags.quick)?;
        }
        summary.magnitude_rates = studies::magnitude_rates(&bench, doft, oft, flags.quick)?;
        summary.orthogonality = studies::orthogonality(&bench, doft.best_rate())?;
    }
    let (rounds, steps) = if flags.quick { (2, 10) } else { (7, 40) };
    summary.costs = cost::measure(task, &entries, rounds, steps)?;
    Ok((bench.store.runs(), summary))
}
