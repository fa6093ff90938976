//! Text for terminals: what comes from outside must not drive them.
//!
//! Names, tags, labels and errors come from servers, images and disks. A control character in one moves the cursor or
//! runs a command of the terminal; an override of the direction shows a name as another. All text that is printed
//! goes through [`Escaped`]; a value that has a line or a column of its own goes through [`plain`], too.
//!
//! An escape is that of JSON, `\u202e`, so that the same writer serves text and JSON.

use std::fmt::{self, Display};
use std::io::{self, Write};

/// Whether a character does something other than to be seen.
fn is_active(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Invisible, or of the direction of text.
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Writes `text`, in which what `keep` does not keep is escaped.
fn escape(text: &str, keep: fn(char) -> bool, out: &mut impl fmt::Write) -> fmt::Result {
    for c in text.chars() {
        if is_active(c) && !keep(c) {
            // JSON knows only these.
            c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}"))?;
        } else {
            out.write_char(c)?;
        }
    }
    Ok(())
}

/// `text` on one line, with all that a terminal would act on escaped.
pub fn plain(text: impl Display) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = escape(&text.to_string(), |_| false, &mut out);
    out
}

/// `text` with all but newlines and tabs escaped that a terminal would act on.
pub fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let _ = escape(text, |c| matches!(c, '\n' | '\t'), &mut out);
    out
}

/// Passes text on with all but newlines and tabs escaped that a terminal would act on.
pub struct Escaped<W>(pub W);

impl<W: Write> Write for Escaped<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_all(escaped(&String::from_utf8_lossy(bytes)).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> String {
        let mut out = Escaped(Vec::new());
        out.write_all(text.as_bytes()).unwrap();
        String::from_utf8(out.0).unwrap()
    }

    #[test]
    fn active_characters_are_escaped() {
        for (text, expected) in [
            ("a name", "a name"),
            ("größer, 日本, 🦀", "größer, 日本, 🦀"),
            ("\x1b]0;title\x07", "\\u001b]0;title\\u0007"),
            ("\u{9b}2J\u{7f}\r", "\\u009b2J\\u007f\\u000d"),
            ("gpj.\u{202e}exe\u{2066}\u{200b}", "gpj.\\u202eexe\\u2066\\u200b"),
            ("\u{e0041}", "\\udb40\\udc41"),
        ] {
            assert_eq!(plain(text), expected);
            assert_eq!(written(text), expected);
        }
        assert_eq!(plain("a\nb\tc"), "a\\u000ab\\u0009c");
        assert_eq!(written("a\nb\tc"), "a\nb\tc");
    }

    #[test]
    fn json_stays_the_same() {
        let value = serde_json::json!({"\u{202e}\u{9b}": "\x1b\\u{e0041}\u{7f}\n"});
        let text = written(&serde_json::to_string_pretty(&value).unwrap());
        assert!(text.chars().all(|c| c == '\n' || c.is_ascii_graphic() || c == ' '), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[test]
    fn bytes_that_are_not_text() {
        let mut out = Escaped(Vec::new());
        out.write_all(b"a\xff\x9bb").unwrap();
        assert_eq!(out.0, "a\u{fffd}\u{fffd}b".as_bytes());
    }
}
