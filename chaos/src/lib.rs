//! The campaign against a Tidewire cluster: processes are killed, paused and cut off while writers write and clients
//! resume, and a checker proves from the recorded history that nothing was lost, repeated or reordered.
//!
//! `run` composes: a [`plan`] from one seed, a [`cluster`] of child processes, a [`workload`] that records a
//! [`history`], [`faults`] that follow the plan. [`checker`] and [`figures`] are pure functions of the history;
//! [`report`] prints them. Nothing here knows the server's insides: it uses running processes and the public client.

pub mod campaign;
pub mod checker;
pub mod cluster;
pub mod faults;
pub mod figures;
pub mod history;
pub mod plan;
pub mod preflight;
pub mod report;
pub mod run;
pub mod sandbox;
pub mod storm;
pub mod workload;

#[cfg(test)]
mod model;
