//! `chaos`: the command line of the campaign.

fn main() {}
