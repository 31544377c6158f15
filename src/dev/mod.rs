//! `tidewire dev`: a whole cluster on one machine, from nothing, gone without a trace.
mod account;
mod balancer;
mod binaries;
mod port;
pub mod postgres;
mod run_folder;
mod supervisor;
