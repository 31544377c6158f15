//! Loss of packets on the loopback of the sandbox, by nft rules in a table of our own.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

/// Nobody else's: it lives in the sandbox's own network.
const TABLE: &str = "inet tidewire_chaos";

/// The table; dropping it removes the rules.
#[derive(Debug)]
pub struct PacketFilter(());

impl PacketFilter {
    /// Makes the table.
    ///
    /// # Errors
    /// There is no `nft`, or it may not.
    pub fn new() -> anyhow::Result<Self> {
        let script = format!(
            "table {TABLE}\ndelete table {TABLE}\n\
             table {TABLE} {{\n chain output {{\n type filter hook output priority 0;\n }}\n}}\n"
        );
        nft(&script)?;
        Ok(Self(()))
    }

    /// Loses so many of a hundred packets to and from each of the ports, instead of any earlier rules.
    ///
    /// # Errors
    /// `nft` refuses.
    pub fn lose(&self, ports: &[u16], percent: u8) -> anyhow::Result<()> {
        let mut script = format!("flush table {TABLE}\n");
        let list: Vec<String> = ports.iter().map(u16::to_string).collect();
        for side in ["dport", "sport"] {
            let list = list.join(", ");
            let _ = writeln!(
                script,
                "add rule {TABLE} output tcp {side} {{ {list} }} numgen random mod 100 < {percent} drop"
            );
        }
        nft(&script)
    }

    /// No more rules.
    ///
    /// # Errors
    /// `nft` refuses.
    pub fn clear(&self) -> anyhow::Result<()> {
        nft(&format!("flush table {TABLE}"))
    }
}

impl Drop for PacketFilter {
    fn drop(&mut self) {
        let _ = nft(&format!("delete table {TABLE}"));
    }
}

fn nft(script: &str) -> anyhow::Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("nft (package nftables)")?;
    child.stdin.take().context("nft's input")?.write_all(script.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
