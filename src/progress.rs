//! Progress of long work: bars on a terminal, a line every few seconds otherwise, JSON lines, or nothing.
//!
//! Download, dehydrate and rehydrate report through this and know nothing of how it is shown. It always goes to
//! stderr, because stdout carries disk images, and a stderr that is gone never stops the work. All of it may be used
//! from several threads.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::terminal::{Escaped, plain};

/// Time between two lines of plain progress: often enough to see that something moves, rare enough for a log.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Time between two JSON lines of progress: what a front end redraws at.
const JSON_EVERY: Duration = Duration::from_secs(1);

/// How progress is shown; always on stderr.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Bars on a terminal, a line every few seconds otherwise
    #[default]
    Auto,
    /// A line every few seconds
    Plain,
    /// One JSON object a line
    Json,
    /// Nothing
    None,
}

/// Where tasks report to. Clones report to the same place.
#[derive(Clone)]
pub struct Progress(Arc<Shown>);

enum Shown {
    Bars(MultiProgress),
    Lines(Mutex<Lines>),
    None,
}

struct Lines {
    json: bool,
    /// When the last progress line was printed.
    last: Instant,
    running: Vec<Weak<State>>,
}

/// One piece of work, shown until it is dropped. It counts as done only after [`Task::finish`].
pub struct Task {
    progress: Progress,
    state: Arc<State>,
    bar: Option<ProgressBar>,
    finished: bool,
}

struct State {
    name: String,
    /// How many bytes there are; `u64::MAX` while that is not known.
    total: AtomicU64,
    done: AtomicU64,
    started: Instant,
}

impl Progress {
    /// Shows progress as `mode` says.
    pub fn new(mode: Mode) -> Self {
        let json = match mode {
            Mode::Auto if io::stderr().is_terminal() => {
                return Self(Arc::new(Shown::Bars(MultiProgress::with_draw_target(
                    ProgressDrawTarget::stderr(),
                ))));
            }
            Mode::None => return Self(Arc::new(Shown::None)),
            Mode::Auto | Mode::Plain => false,
            Mode::Json => true,
        };
        Self(Arc::new(Shown::Lines(Mutex::new(Lines { json, last: Instant::now(), running: Vec::new() }))))
    }

    /// Starts a task of `total` bytes, or of an unknown number of them.
    pub fn task(&self, name: impl Into<String>, total: Option<u64>) -> Task {
        let state = Arc::new(State {
            name: name.into(),
            total: AtomicU64::new(total.unwrap_or(u64::MAX)),
            done: AtomicU64::new(0),
            started: Instant::now(),
        });
        let mut bar = None;
        match &*self.0 {
            Shown::Bars(bars) => {
                let new = bars.add(ProgressBar::new(0).with_message(plain(&state.name)));
                new.set_style(style(total.is_some()));
                new.enable_steady_tick(Duration::from_millis(200));
                if let Some(total) = total {
                    new.set_length(total);
                }
                bar = Some(new);
            }
            Shown::Lines(lines) => {
                let mut lines = lock(lines);
                lines.running.retain(|task| task.strong_count() > 0);
                lines.running.push(Arc::downgrade(&state));
                if lines.json {
                    state.json("start");
                }
            }
            Shown::None => {}
        }
        Task { progress: self.clone(), state, bar, finished: false }
    }

    /// Runs `f`, which writes to stderr, while no bar is in its way.
    pub fn suspend<T>(&self, f: impl FnOnce() -> T) -> T {
        match &*self.0 {
            Shown::Bars(bars) => bars.suspend(f),
            Shown::Lines(_) | Shown::None => f(),
        }
    }
}

impl Task {
    /// `n` more bytes are done.
    pub fn advance(&self, n: u64) {
        self.state.done.fetch_add(n, Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.inc(n);
        } else if let Shown::Lines(lines) = &*self.progress.0
            // A line that another thread is printing right now is line enough.
            && let Ok(mut lines) = lines.try_lock()
        {
            lines.tick();
        }
    }

    /// Starts again, with `done` bytes done already.
    pub fn restart(&self, done: u64) {
        self.state.done.store(done, Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    /// There are `total` bytes, as is known only now.
    pub fn set_total(&self, total: u64) {
        self.state.total.store(total, Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.set_style(style(true));
            bar.set_length(total);
        }
    }

    /// Advances by what is read from `inner` through this.
    pub fn reader<R: Read>(&self, inner: R) -> TaskReader<'_, R> {
        TaskReader { task: self, inner }
    }

    /// It is done, whatever was counted.
    pub fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        match (&*self.progress.0, &self.bar) {
            (_, Some(bar)) => bar.finish_and_clear(),
            (Shown::Lines(lines), None) => {
                let lines = lock(lines);
                match (lines.json, self.finished) {
                    (true, true) => self.state.json("finish"),
                    (true, false) => self.state.json("abort"),
                    (false, true) => line(&format!(
                        "{}: done, {} in {:.1} s",
                        plain(&self.state.name),
                        HumanBytes(self.state.done.load(Ordering::Relaxed)),
                        self.state.started.elapsed().as_secs_f64()
                    )),
                    // Whoever gives up says why.
                    (false, false) => {}
                }
            }
            _ => {}
        }
    }
}

impl Lines {
    /// Prints how far every running task is, if the time for that has come.
    fn tick(&mut self) {
        if self.last.elapsed() < if self.json { JSON_EVERY } else { PLAIN_EVERY } {
            return;
        }
        self.last = Instant::now();
        self.running.retain(|task| task.strong_count() > 0);
        let running = self.running.iter().filter_map(Weak::upgrade);
        if self.json {
            running.for_each(|task| task.json("progress"));
        } else {
            line(&running.map(|task| task.text()).collect::<Vec<_>>().join("; "));
        }
    }
}

impl State {
    fn total(&self) -> Option<u64> {
        Some(self.total.load(Ordering::Relaxed)).filter(|&total| total != u64::MAX)
    }

    fn text(&self) -> String {
        let (name, done) = (plain(&self.name), self.done.load(Ordering::Relaxed));
        match self.total() {
            Some(total) if total > 0 => {
                let percent = u128::from(done) * 100 / u128::from(total);
                format!("{name} {percent} % of {}", HumanBytes(total))
            }
            _ => format!("{name} {}", HumanBytes(done)),
        }
    }

    fn json(&self, event: &str) {
        let done = self.done.load(Ordering::Relaxed);
        line(&json!({"event": event, "task": self.name, "done": done, "total": self.total()}).to_string());
    }
}

/// A reader that advances a task by what is read through it.
pub struct TaskReader<'a, R> {
    task: &'a Task,
    inner: R,
}

impl<R: Read> Read for TaskReader<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.task.advance(n as u64);
        Ok(n)
    }
}

fn style(total: bool) -> ProgressStyle {
    let template = if total {
        "{msg:50!} {bar:20} {bytes:>10}/{total_bytes:>10} {bytes_per_sec:>12} {eta:>4}"
    } else {
        "{msg:50!} {spinner} {bytes:>10} {bytes_per_sec:>12}"
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// One line in one write, so that lines of several threads do not mix. `eprintln!` would panic when stderr is gone.
fn line(text: &str) {
    let _ = Escaped(io::stderr()).write_all(format!("{text}\n").as_bytes());
}

/// Progress goes on when a thread that reported it has panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
