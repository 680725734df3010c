//! [`open`]: the group that the program was started in.

use super::{Alone, Processes};
use crate::error::{Error, Result};

/// Where launchers say how many processes they started: Open MPI's and MPICH's `mpirun`, `srun`.
const SIZES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];

/// The processes that `mpirun` or `srun` started, or [`Alone`] where none did. To be called once, by the
/// thread that trains.
///
/// # Errors
///
/// [`Error::Argument`] where several processes were started that would not know of one another: by a build
/// without the feature `mpi`, or with another MPI than that of the launcher.
pub fn open() -> Result<Box<dyn Processes>> {
    let started = started(|name| std::env::var(name).ok());
    let group = group(&started)?;
    match started {
        Some((_, count)) if count != group.size() && count > 1 => Err(unconnected(
            &started,
            "started by the `mpirun` of the MPI that the program is linked to, or `srun --mpi=pmix`",
        )),
        _ => Ok(group),
    }
}

/// Which launcher started how many processes.
fn started(variable: impl Fn(&str) -> Option<String>) -> Option<(&'static str, usize)> {
    let count = |name| Some((name, variable(name)?.trim().parse().ok()?));
    SIZES.into_iter().find_map(count)
}

#[cfg(feature = "mpi")]
fn group(started: &Option<(&'static str, usize)>) -> Result<Box<dyn Processes>> {
    match started {
        Some(_) => Ok(Box::new(super::mpi::Mpi::new()?)),
        None => Ok(Box::new(Alone)),
    }
}

#[cfg(not(feature = "mpi"))]
fn group(started: &Option<(&'static str, usize)>) -> Result<Box<dyn Processes>> {
    match started {
        Some((_, count)) if *count > 1 => {
            Err(unconnected(started, "a build with `--features mpi`"))
        }
        _ => Ok(Box::new(Alone)),
    }
}

/// Each would train all by itself, and write over the files of the others.
fn unconnected(started: &Option<(&'static str, usize)>, expected: &str) -> Error {
    let (name, count) = started.unwrap_or(("", 1));
    let found = format!("{count} by {name}, of which each knows only itself");
    Error::argument(
        "parallel::open",
        "the number of processes",
        found,
        format!("1, or {expected}"),
    )
}

#[cfg(test)]
mod tests {
    use super::started;

    #[test]
    fn the_launcher_is_known_by_its_variables() {
        let with = |set: &'static str, value: &'static str| {
            started(move |name| (name == set).then(|| value.to_string()))
        };
        assert_eq!(with("PMI_SIZE", "4"), Some(("PMI_SIZE", 4)));
        assert_eq!(with("PMI_SIZE", "many"), None);
        assert_eq!(with("HOME", "4"), None);
    }
}
