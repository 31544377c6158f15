//! What is done to the cluster.
