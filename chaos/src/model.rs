//! The protocol core as a model that is searched exhaustively.
