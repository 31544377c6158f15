//! Pure: does a history keep every promise?
