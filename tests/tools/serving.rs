//! The program as it serves.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

/// `rehydrator serve` on a port of its own, stopped when dropped.
pub struct Serving {
    pub child: Child,
    /// ADDRESS:PORT.
    pub address: String,
    log: Arc<Mutex<String>>,
}

impl Serving {
    pub fn start<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_rehydrator"))
            .args(["serve", "--listen=127.0.0.1:0"])
            .args(args)
            .env("REHYDRATOR_LOG", "rehydrator=info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let mut said = String::new();
        let line = lines.find(|line| {
            said += &format!("{line}\n");
            line.contains("listening on ")
        });
        let line = line.unwrap_or_else(|| panic!("it does not listen: {said}"));
        let address = line.rsplit_once(' ').unwrap().1.to_owned();
        let log = Arc::new(Mutex::new(said));
        let all = log.clone();
        std::thread::spawn(move || lines.for_each(|line| *all.lock().unwrap() += &(line + "\n")));
        Self { child, address, log }
    }

    /// The most memory that it has had in use, in MiB.
    pub fn peak(&self) -> u64 {
        self.status("VmHWM:")
    }

    /// The memory that it has in use now, in MiB.
    pub fn memory(&self) -> u64 {
        self.status("VmRSS:")
    }

    fn status(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let size = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        size.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
    }

    /// Ends it, and gives what it said.
    pub fn log(mut self) -> String {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // The thread that reads it ends with the process, and lets go of its copy.
        while Arc::strong_count(&self.log) > 1 {
            std::thread::yield_now();
        }
        self.log.lock().unwrap().clone()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
