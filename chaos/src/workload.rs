//! What writers and clients do, and its recording.
use serde::{Deserialize, Serialize};
/// Temporarily here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs)]
pub struct WorkloadPlan {
    pub seed: u64,
    pub writers: u32,
    pub transactions_per_second: u32,
    pub keys: u32,
    pub clients: u32,
}
