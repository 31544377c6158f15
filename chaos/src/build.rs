//! The servers under test, built from the sources beside this program unless one is named.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

/// The servers that a command needs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Servers {
    /// As released.
    pub(crate) released: PathBuf,
    /// With fail points and mutants.
    pub(crate) failpoints: Option<PathBuf>,
}

/// Tells the second and third process of a sandbox what the first one built.
const RELEASED: &str = "TIDEWIRE_CHAOS_SERVER";
const FAILPOINTS: &str = "TIDEWIRE_CHAOS_SERVER_FAILPOINTS";

/// Builds what is needed, or takes what the process outside the sandbox has built.
pub(crate) fn servers(named: Option<&Path>, failpoints: bool) -> anyhow::Result<Servers> {
    let built = |name| std::env::var_os(name).map(PathBuf::from);
    if let Some(released) = built(RELEASED) {
        return Ok(Servers { released, failpoints: built(FAILPOINTS) });
    }
    let released = match named {
        Some(path) => {
            ensure!(path.exists(), "there is no server at {}", path.display());
            path.canonicalize()?
        }
        None => build(false)?,
    };
    let failpoints = if failpoints { Some(build(true)?) } else { None };
    Ok(Servers { released, failpoints })
}

/// What the sandbox's processes are to know.
pub(crate) fn environment(servers: &Servers) -> Vec<(&'static str, PathBuf)> {
    let mut all = vec![(RELEASED, servers.released.clone())];
    all.extend(servers.failpoints.clone().map(|path| (FAILPOINTS, path)));
    all
}

/// Both are built into one folder, so each is copied out of the other's way.
fn build(failpoints: bool) -> anyhow::Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&root).args(["build", "--release", "--locked", "--package", "tidewire", "--bin", "tidewire"]);
    if failpoints {
        command.args(["--features", "chaos"]);
    }
    // Under `cargo run` we have cargo's variables about ourselves: with them, build scripts that look at them would run
    // again, and everything that depends on theirs would be built anew.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_") && !matches!(&*text, "CARGO_HOME" | "CARGO_TARGET_DIR") {
            command.env_remove(&name);
        }
    }
    let status = command.status().context("cargo cannot be run: name a server with --server")?;
    ensure!(status.success(), "the server does not build");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let folder = target.join("chaos");
    std::fs::create_dir_all(&folder)?;
    let copy = folder.join(if failpoints { "tidewire-failpoints" } else { "tidewire" });
    // A server of another run may be executing the old one: replaced, not written over.
    let fresh = copy.with_extension(std::process::id().to_string());
    std::fs::copy(target.join("release/tidewire"), &fresh)?;
    std::fs::rename(&fresh, &copy)?;
    Ok(copy)
}
