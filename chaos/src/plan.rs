//! One seed gives the whole plan of a run.
