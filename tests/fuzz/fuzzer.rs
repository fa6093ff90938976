//! libFuzzer around one of the targets: the one that the program is named for.

#![no_main]
#![allow(unreachable_pub, reason = "the targets are public for the other program that includes them")]

mod targets;

use std::panic::{catch_unwind, set_hook};
use std::sync::{LazyLock, Mutex, PoisonError};

static TARGET: LazyLock<targets::Target> = LazyLock::new(|| {
    let program = std::env::args().next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default();
    let found = targets::TARGETS.iter().find(|(target, _)| *target == name);
    found.unwrap_or_else(|| panic!("{name} is no target")).1
});

/// The message of the last panic.
static PANIC: Mutex<String> = Mutex::new(String::new());

fn note(panic: &std::panic::PanicHookInfo<'_>) {
    *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = panic.to_string();
}

// libfuzzer-sys ends at any panic. One that the program catches, as it does around preflate, is an error like others.
libfuzzer_sys::fuzz_target!(init: set_hook(Box::new(note)), |bytes: &[u8]| {
    if catch_unwind(|| TARGET(bytes)).is_err() {
        eprintln!("{}", PANIC.lock().unwrap_or_else(PoisonError::into_inner));
        std::process::abort();
    }
});
