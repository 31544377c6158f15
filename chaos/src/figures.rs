//! Pure: how long things took, from a history.
