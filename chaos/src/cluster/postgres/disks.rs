//! Small disks for Postgres: tmpfs mounts that can be shrunk to what they hold, so that the next page finds no room.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;

use super::Account;

/// Of each disk, when it is not full.
const ROOM: &str = "size=2g";

#[derive(Debug)]
pub(super) struct Disks {
    tables: [PathBuf; 2],
    wal: PathBuf,
    account: Account,
}

impl Disks {
    pub(super) fn mount(folder: &Path, account: Account) -> anyhow::Result<Self> {
        let disks =
            Self { tables: [folder.join("disk-0"), folder.join("disk-1")], wal: folder.join("disk-wal"), account };
        for path in disks.all() {
            fs::create_dir_all(path)?;
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(ROOM))
                .with_context(|| format!("cannot mount a tmpfs on {}", path.display()))?;
            account.own(path)?;
        }
        account.folder(&disks.wal())?;
        account.folder(&disks.tablespace(0))?;
        account.folder(&disks.tablespace(1))?;
        Ok(disks)
    }

    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        self.tables.iter().chain([&self.wal])
    }

    /// A folder in the mount: Postgres wants an empty one, and a mount may have its own ideas.
    pub(super) fn tablespace(&self, slot: usize) -> PathBuf {
        self.tables[slot].join("tables")
    }

    pub(super) fn wal(&self) -> PathBuf {
        self.wal.join("wal")
    }

    pub(super) fn empty(&self, slot: usize) -> anyhow::Result<()> {
        let path = self.tablespace(slot);
        fs::remove_dir_all(&path)?;
        self.account.folder(&path)
    }

    /// Down to what it holds.
    pub(super) fn shrink(&self, inside: &Path) -> anyhow::Result<()> {
        let disk = self.all().find(|disk| inside.starts_with(disk)).context("a path on none of the disks")?;
        let status = statvfs(disk.as_path())?;
        let used = (status.blocks() - status.blocks_free()) * status.fragment_size();
        remount(disk, &format!("size={used}"))
    }

    pub(super) fn grow(&self) -> anyhow::Result<()> {
        self.all().try_for_each(|disk| remount(disk, ROOM))
    }

    pub(super) fn unmount(&self) {
        for disk in self.all() {
            // The sandbox's end unmounts what is still busy.
            let _ = umount2(disk, MntFlags::MNT_DETACH);
        }
    }
}

fn remount(disk: &Path, size: &str) -> anyhow::Result<()> {
    mount(Some("tmpfs"), disk, Some("tmpfs"), MsFlags::MS_REMOUNT, Some(size))
        .with_context(|| format!("cannot remount {} with {size}", disk.display()))
}
