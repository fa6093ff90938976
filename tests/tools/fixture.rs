//! What tests make once for all of them, although each may run in a process of its own.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A directory that `make` fills once for every test that asks for `name`. It stays for the next run, and is made again
/// when `inputs` or the program under test has changed.
///
/// A lock beside the directory is held exclusively while `make` works, and shared until the process ends, so that nobody
/// replaces a fixture that a test reads.
pub fn fixture(name: &str, inputs: &str, make: impl FnOnce(&Path)) -> PathBuf {
    static LOCKS: Mutex<Vec<File>> = Mutex::new(Vec::new());
    let fixtures = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fixtures");
    fs::create_dir_all(&fixtures).unwrap();
    let [dir, stamp, lock] = ["", ".stamp", ".lock"].map(|suffix| fixtures.join(format!("{name}{suffix}")));
    let program = fs::metadata(env!("CARGO_BIN_EXE_rehydrator")).unwrap();
    let wanted = format!("{} {}.{}\n{inputs}", program.len(), program.mtime(), program.mtime_nsec());
    let is_made = || fs::read_to_string(&stamp).is_ok_and(|found| found == wanted);

    let lock = File::create(&lock).unwrap();
    let mut make = Some(make);
    loop {
        lock.lock_shared().unwrap();
        if is_made() {
            break;
        }
        // A shared lock cannot become an exclusive one in one step: another process may come first.
        lock.unlock().unwrap();
        lock.lock().unwrap();
        if !is_made() {
            let make = make.take().expect("a fixture that somebody takes away");
            let _ = fs::remove_file(&stamp);
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir(&dir).unwrap();
            make(&dir);
            fs::write(&stamp, &wanted).unwrap();
        }
        lock.unlock().unwrap();
    }
    LOCKS.lock().unwrap().push(lock);
    dir
}
