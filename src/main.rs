//! Parses the command line, and prints what went wrong.

fn main() {}
