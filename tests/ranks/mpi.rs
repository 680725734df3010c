//! The same under `mpirun`, whose processes are this test program again.

use crate::common::programs::mpirun;
use crate::run::{Fault, Plan, train};
use crate::sharded::compare;
use candle_doft::train::parallel::{Alone, open};
use candle_doft::{DoftConfig, Magnitude};
use std::io::Read;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// From what befalls one rank to the end of all.
const END: Duration = Duration::from_secs(5);

fn ended(child: &mut Child, patience: Duration) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if start.elapsed() > patience {
            child.kill().unwrap();
            panic!("it hangs");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs `child` on this many ranks: exit code, all that was printed, and how long the end took after the
/// fault.
fn run(ranks: usize, settings: &str) -> Option<(Option<i32>, String, Duration)> {
    run_child(ranks, "mpi::child", settings)
}

fn run_child(ranks: usize, child: &str, settings: &str) -> Option<(Option<i32>, String, Duration)> {
    let mut command = mpirun()?;
    let mut child = command
        .args(["-n", &ranks.to_string()])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", child, "--ignored", "--nocapture"])
        .env("CANDLE_DOFT_RANKS", settings)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut err = child.stderr.take().unwrap();
    let err = std::thread::spawn(move || {
        let mut text = String::new();
        err.read_to_string(&mut text).unwrap();
        text
    });
    let out = std::thread::spawn(move || {
        let (mut text, mut byte, mut since) = (String::new(), [0], None);
        while out.read(&mut byte).unwrap() > 0 {
            text.push(char::from(byte[0]));
            if since.is_none() && text.ends_with("FAULT\n") {
                since = Some(Instant::now());
            }
        }
        (text, since)
    });
    let status = ended(&mut child, PATIENCE);
    let at = Instant::now();
    let (out, since) = out.join().unwrap();
    let took = since.map_or(Duration::ZERO, |since| at.duration_since(since));
    Some((status.code(), out + &err.join().unwrap(), took))
}

/// One rank of the runs of this file.
#[test]
#[ignore = "it is run by the others"]
fn child() {
    let Ok(settings) = std::env::var("CANDLE_DOFT_RANKS") else {
        return;
    };
    let (fault, micro_batches) = settings.split_once(' ').unwrap();
    let kinds = [
        Fault::Data,
        Fault::Loss,
        Fault::Gradient,
        Fault::Stop,
        Fault::Panic,
        Fault::Killed,
        Fault::Alone,
    ];
    let kind = kinds.into_iter().find(|kind| format!("{kind:?}") == fault);
    let plan = Plan {
        micro_batches: micro_batches.parse().unwrap(),
        fault: kind.map(|kind| (kind, 2, 2)),
        told: true,
        ..Plan::default()
    };
    let group = open().unwrap();
    let left = train(&*group, &plan);
    if let Some(error) = &left.error {
        println!("rank {} ended with: {error}", group.rank());
        // All have come to it, or this one alone; the drop of the group ends all.
        drop(group);
        std::process::exit(0);
    }
    println!(
        "rank {} of {} made {} steps to {:016x}",
        group.rank(),
        group.size(),
        left.steps,
        left.hash()
    );
    group.finish().unwrap();
}

#[test]
fn processes_end_with_the_bits_of_one() {
    for micro_batches in [4, 12] {
        let plan = Plan {
            micro_batches,
            ..Plan::default()
        };
        let alone = train(&Alone, &plan).hash();
        for ranks in [1, 2, 4] {
            let Some((code, out, _)) = run(ranks, &format!("none {micro_batches}")) else {
                return;
            };
            assert_eq!(code, Some(0), "{ranks}: {out}");
            for rank in 0..ranks {
                let line = format!("rank {rank} of {ranks} made 5 steps to {alone:016x}");
                assert!(out.contains(&line), "{line}\n{out}");
            }
        }
    }
}

#[test]
fn what_befalls_one_rank_ends_all_in_time() {
    for (fault, said) in [
        (
            "Data",
            Some("rank 1 ended with: rank 2: words.txt: cannot be read"),
        ),
        (
            "Loss",
            Some("rank 0 ended with: rank 2: step 3: the loss is NaN"),
        ),
        (
            "Gradient",
            Some("rank 3 ended with: step 3: the squared gradient"),
        ),
        ("Panic", Some("a bug")),
        ("Killed", None),
        ("Alone", None),
    ] {
        let Some((code, out, took)) = run(4, &format!("{fault} 4")) else {
            return;
        };
        assert_ne!(code, Some(0), "{fault}: {out}");
        assert!(out.contains("FAULT"), "{fault}: {out}");
        assert!(took < END, "{fault}: the end took {took:?}");
        assert!(!out.contains("made 5 steps"), "{fault}: {out}");
        if let Some(said) = said {
            assert!(out.contains(said), "{fault}: {out}");
        }
    }
}

#[test]
fn who_is_asked_to_stop_stops_all_processes_after_the_step() {
    let Some((code, out, _)) = run(4, "Stop 4") else {
        return;
    };
    assert_eq!(code, Some(0), "{out}");
    assert_eq!(out.matches("made 3 steps").count(), 4, "{out}");
}

/// One rank of the test below.
#[test]
#[ignore = "it is run by another"]
fn sharded_child() {
    let Ok(file) = std::env::var("CANDLE_DOFT_RANKS") else {
        return;
    };
    // MPI is opened once in a process.
    let config = DoftConfig::default()
        .with_block_size(8)
        .with_magnitude(Magnitude::Absolute);
    compare(open().unwrap(), &config, Path::new(&file)).unwrap();
    println!("THE SAME");
}

#[test]
fn processes_with_parts_of_the_layers_compute_what_one_does() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adapter.safetensors");
    let Some((code, out, _)) = run_child(2, "mpi::sharded_child", file.to_str().unwrap()) else {
        return;
    };
    assert_eq!(code, Some(0), "{out}");
    assert_eq!(out.matches("THE SAME").count(), 2, "{out}");
    assert!(file.exists());
}
