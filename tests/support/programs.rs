//! Other programs: the examples, and Python where it has what is needed.

use std::path::Path;
use std::process::Command;

/// An example, where it was built; says so where it was not.
pub fn example(name: &str) -> Option<Command> {
    let test = std::env::current_exe().unwrap();
    let built = test.parent().and_then(Path::parent).unwrap();
    let program = built.join("examples").join(name);
    if !program.exists() {
        println!("SKIPPED: the example {name} is not built; `cargo test` builds it");
        return None;
    }
    Some(Command::new(program))
}

/// `mpirun` (`CANDLE_DOFT_MPIRUN`, of the MPI that the tests are linked to), with threads that run on any
/// core and more processes than there are cores; says so where there is none.
pub fn mpirun() -> Option<Command> {
    let program = std::env::var("CANDLE_DOFT_MPIRUN").unwrap_or_else(|_| "mpirun".into());
    if Command::new(&program).arg("--version").output().is_err() {
        println!("SKIPPED: there is no {program}");
        return None;
    }
    let mut command = Command::new(program);
    command
        .args(["--bind-to", "none"])
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("OMPI_MCA_rmaps_base_oversubscribe", "1");
    Some(command)
}

/// Python (`CANDLE_DOFT_PYTHON`, else `python3`), where it can import these modules.
pub fn python(modules: &str) -> Option<Command> {
    let python = std::env::var("CANDLE_DOFT_PYTHON").unwrap_or_else(|_| "python3".into());
    let import = format!("import {modules}");
    let found = Command::new(&python).args(["-c", &import]).output().ok()?;
    found.status.success().then(|| Command::new(python))
}
