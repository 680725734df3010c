//! `finetune` under `mpirun`, and what a build without MPI says to that.

use crate::programs::{Ended, Home};
use anyhow::Result;

/// Started by a launcher that says so in the environment, as several processes that know nothing of one
/// another: each would train by itself and write over the others.
#[test]
fn processes_that_would_not_know_of_one_another_are_refused() -> Result<()> {
    if cfg!(feature = "mpi") {
        return Ok(());
    }
    let Some(home) = Home::new()? else {
        return Ok(());
    };
    let started = |variable: &str, count: &str| -> Ended {
        let mut command = home.command("finetune");
        let out = home.at("out");
        command.args(home.training(&["--out", &out, "--steps", "1"]));
        command.env(variable, count).output().unwrap().into()
    };
    for variable in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"] {
        let ended = started(variable, "4");
        assert_eq!(ended.code, Some(1), "{}", ended.err);
        let expected = format!(
            "error: `parallel::open`: the number of processes is 4 by {variable}, of which each knows only \
             itself, expected 1, or a build with `--features mpi`\n"
        );
        assert_eq!(ended.err, expected);
        assert!(!home.path("out").exists());
    }
    assert_eq!(started("PMI_SIZE", "1").code, Some(0));
    Ok(())
}

#[cfg(all(feature = "mpi", unix))]
mod mpi {
    use super::{Ended, Home, Result};
    use crate::common::programs::mpirun;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    /// A run that takes longer hangs.
    const PATIENCE: Duration = Duration::from_secs(300);

    /// From what befalls one rank to the end of all.
    const END: Duration = Duration::from_secs(5);

    /// The flags of every run here: as many micro-batches as there are ranks at most.
    const COMMON: [&str; 6] = ["--batch", "1", "--accumulate", "4", "--steps", "6"];

    fn finetune(home: &Home, ranks: usize, parts: &[&[&str]]) -> Command {
        let mut command = mpirun().expect("it was there");
        let program = home.command("finetune");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        for (name, value) in program.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        for (i, more) in parts.iter().enumerate() {
            command.args(if i > 0 { &[":"][..] } else { &[] });
            command.args(["-n", &(ranks / parts.len()).to_string()]);
            command.arg(program.get_program());
            let common = COMMON.chunks(2).filter(|pair| !more.contains(&pair[0]));
            let flags = [&common.flatten().copied().collect::<Vec<_>>(), *more].concat();
            command.args(home.training(&flags));
        }
        command
    }

    /// Waits for the end; kills what hangs.
    fn end(mut child: Child, patience: Duration) -> Ended {
        let start = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if start.elapsed() > patience {
                child.kill().unwrap();
                panic!("no end after {patience:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        child.wait_with_output().unwrap().into()
    }

    fn on(home: &Home, ranks: usize, more: &[&str]) -> Ended {
        end(finetune(home, ranks, &[more]).spawn().unwrap(), PATIENCE)
    }

    fn home() -> Result<Option<Home>> {
        match mpirun() {
            Some(_) => Home::new(),
            None => Ok(None),
        }
    }

    #[test]
    fn an_adapter_is_the_same_bytes_from_one_two_and_four_processes() -> Result<()> {
        let Some(home) = home()? else {
            return Ok(());
        };
        // Without mpirun: what a build without the feature does as well.
        home.finetune(&[COMMON.as_slice(), &["--out", &home.at("plain")]].concat());
        let losses = |out: &str| -> Vec<f64> {
            let lines = home.metrics(out);
            lines
                .iter()
                .filter_map(|line| line["loss"].as_f64())
                .collect()
        };
        assert_eq!(losses("plain").len(), 6);
        for ranks in [1, 2, 4] {
            let out = format!("on{ranks}");
            let ended = on(&home, ranks, &["--out", &home.at(&out)]);
            assert_eq!(ended.code, Some(0), "{ranks}: {}", ended.err);
            assert!(home.adapter(&out) == home.adapter("plain"), "{ranks}");
            assert_eq!(losses(&out), losses("plain"), "{ranks}");
            for line in home
                .metrics(&out)
                .iter()
                .filter(|line| line["loss"].is_f64())
            {
                let seconds = line["reduction_seconds"].as_f64();
                let there = seconds.is_some_and(|seconds| (seconds > 0.) == (ranks > 1));
                assert!(there, "{ranks}: {line}");
            }
            // Of one process alone.
            let told = ended.err.matches("step 6: held-out").count();
            assert_eq!(told, 1, "{ranks}: {}", ended.err);
            let answers = ended.out.matches("now:").count();
            assert_eq!(answers, 1, "{ranks}: {}", ended.out);
        }
        for method in ["lora", "dora"] {
            let run = |out: &str| ["--out", &home.at(out), "--method", method].map(String::from);
            let flags = run("own");
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            home.finetune(&[COMMON.as_slice(), &flags].concat());
            let flags = run("shared");
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            let ended = on(&home, 2, &flags);
            assert_eq!(ended.code, Some(0), "{method}: {}", ended.err);
            assert!(home.adapter("own") == home.adapter("shared"), "{method}");
        }
        Ok(())
    }

    #[test]
    fn a_run_of_four_processes_goes_on_on_one_and_on_two() -> Result<()> {
        let Some(home) = home()? else {
            return Ok(());
        };
        home.finetune(&[COMMON.as_slice(), &["--out", &home.at("whole")]].concat());
        for ranks in [1, 2] {
            let out = home.at(&format!("to{ranks}"));
            let ended = on(&home, 4, &["--out", &out, "--stop-after", "3"]);
            assert_eq!(ended.code, Some(0), "{}", ended.err);
            let ended = on(&home, ranks, &["--out", &out, "--resume"]);
            assert_eq!(ended.code, Some(0), "{}", ended.err);
            let same = home.adapter(&format!("to{ranks}")) == home.adapter("whole");
            assert!(same, "{ranks}");
        }
        Ok(())
    }

    #[test]
    fn what_one_process_cannot_read_ends_all_before_the_first_step() -> Result<()> {
        let Some(home) = home()? else {
            return Ok(());
        };
        let out = home.at("out");
        std::fs::write(
            home.path("other.jsonl"),
            "{\"text\": \"other words\"}\n".repeat(40),
        )?;
        let other = home.at("other.jsonl");
        for (more, said) in [
            (
                ["--model", "nowhere/model/at/all"],
                "error: rank 1: nowhere/model/at/all",
            ),
            (["--lr", "0.5"], "error: rank 1: the run: "),
            (["--data", &other], "error: rank 1: the run: "),
        ] {
            let all = ["--out", &out];
            let odd = [all.as_slice(), &more].concat();
            let child = finetune(&home, 2, &[&all, &odd]).spawn()?;
            let ended = end(child, PATIENCE);
            assert_ne!(ended.code, Some(0), "{said}");
            assert!(ended.err.contains(said), "{said}: {}", ended.err);
            assert!(!home.path("out").join("metrics.jsonl").exists(), "{said}");
        }
        let ended = on(&home, 2, &["--out", &out, "--method", "none"]);
        assert!(
            ended.err.contains("2 processes could share"),
            "{}",
            ended.err
        );
        Ok(())
    }

    #[test]
    fn processes_that_cannot_end_with_the_bytes_of_one_are_told() -> Result<()> {
        let Some(home) = home()? else {
            return Ok(());
        };
        let out = home.at("out");
        for (ranks, accumulate, said) in [
            (3, "4", Some("over 3 processes ends near the bytes of one")),
            (
                2,
                "1",
                Some("so 1 of 2 processes have nothing to do; give 2"),
            ),
            (2, "2", None),
        ] {
            let ended = on(&home, ranks, &["--out", &out, "--accumulate", accumulate]);
            assert_eq!(ended.code, Some(0), "{}", ended.err);
            let notes: Vec<&str> = ended
                .err
                .lines()
                .filter(|l| l.contains("--accumulate"))
                .collect();
            assert_eq!(notes.len(), usize::from(said.is_some()), "{}", ended.err);
            assert!(said.is_none_or(|said| notes[0].contains(said)), "{notes:?}");
        }
        Ok(())
    }

    /// The processes of a run, by what they were started with.
    fn processes(out: &str) -> Vec<u32> {
        let of = |entry: std::fs::DirEntry| -> Option<u32> {
            let id = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8(line).ok()?;
            let words: Vec<&str> = line.split('\0').collect();
            let program = Path::new(words[0]).file_name()?;
            (program == "finetune" && words.contains(&out)).then_some(id)
        };
        let all = std::fs::read_dir("/proc").into_iter().flatten();
        all.filter_map(|entry| of(entry.ok()?)).collect()
    }

    /// A long run of four processes that has made some steps and written a checkpoint.
    fn under_way(home: &Home, out: &str) -> Result<(Child, Vec<u32>)> {
        let flags = [
            "--out",
            out,
            "--steps",
            "5000",
            "--every",
            "3",
            "--sample-tokens",
            "0",
        ];
        let mut child = finetune(home, 4, &[&flags]).spawn()?;
        let start = Instant::now();
        let checkpoint = Path::new(out).join("checkpoint.safetensors");
        while !checkpoint.exists() {
            assert!(child.try_wait()?.is_none(), "it ended by itself");
            assert!(start.elapsed() < PATIENCE, "no checkpoint was written");
            std::thread::sleep(Duration::from_millis(5));
        }
        let ids = processes(out);
        assert_eq!(ids.len(), 4, "{ids:?}");
        Ok((child, ids))
    }

    fn signal(name: &str, id: u32) -> Result<()> {
        assert!(
            Command::new("kill")
                .args([name, &id.to_string()])
                .status()?
                .success()
        );
        Ok(())
    }

    /// The checkpoint is whole: two more steps can be made from it.
    fn goes_on(home: &Home, out: &str) -> Result<()> {
        let file = Path::new(out).join("checkpoint.safetensors");
        let steps = candle_doft::train::Checkpoint::load(file)?.steps();
        assert!(steps >= 3, "{steps}");
        let more = (steps + 2).to_string();
        let flags = [
            "--out",
            out,
            "--steps",
            "5000",
            "--every",
            "3",
            "--resume",
            "--stop-after",
            &more,
        ];
        let ended = on(home, 2, &flags);
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        Ok(())
    }

    #[test]
    fn a_killed_process_ends_all_and_leaves_a_whole_checkpoint() -> Result<()> {
        let Some(home) = home()? else {
            return Ok(());
        };
        let out = home.at("out");
        let (child, ids) = under_way(&home, &out)?;
        signal("-KILL", ids[2])?;
        let ended = end(child, END);
        assert_ne!(ended.code, Some(0), "{}", ended.err);
        assert!(processes(&out).is_empty());
        goes_on(&home, &out)
    }

    #[test]
    fn one_process_that_is_asked_to_stop_stops_all_with_a_checkpoint() -> Result<()> {
        let Some(home) = home()? else {
            return Ok(());
        };
        let out = home.at("out");
        let (child, ids) = under_way(&home, &out)?;
        signal("-INT", ids[1])?;
        let ended = end(child, END);
        assert_eq!(ended.code, Some(0), "{}", ended.err);
        assert_eq!(
            ended.err.matches("--resume goes on from here").count(),
            1,
            "{}",
            ended.err
        );
        goes_on(&home, &out)
    }

    /// The launcher asks its processes, and waits a little before it kills them.
    #[test]
    fn an_interrupted_launcher_ends_all_and_leaves_a_whole_checkpoint() -> Result<()> {
        let Some(home) = home()? else {
            return Ok(());
        };
        let out = home.at("out");
        let (child, _) = under_way(&home, &out)?;
        signal("-INT", child.id())?;
        let ended = end(child, END);
        // Open MPI's launcher fails then, MPICH's says how its processes ended.
        let told = ended.err.contains("stopped after step");
        assert!(told || ended.code != Some(0), "{}", ended.err);
        assert!(processes(&out).is_empty());
        goes_on(&home, &out)
    }
}
