//! Small inputs with a bit of everything, and a release of four artifacts made of them with the real tools.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Runs a shell command in `dir`; a failure names it.
pub fn sh(dir: &Path, command: &str) {
    let out =
        Command::new("bash").args(["-euo", "pipefail", "-c", command]).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Numbers that look random and are always the same.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.below(256) as u8).collect()
    }

    /// Text, program code, zeros, noise, and repeats of what was there before, near and far.
    pub fn mixture(&mut self, n: usize, code: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        while out.len() < n {
            let len = 1 + self.below(40_000);
            match self.below(6) {
                0 => out.resize(out.len() + len, 0),
                1 => out.extend(self.bytes(len)),
                2 => {
                    let at = self.below(code.len() - len);
                    out.extend(&code[at..at + len]);
                }
                3 => {
                    for _ in 0..len / 50 {
                        let (back, run) = (1 + self.below(40_000), 3 + self.below(300));
                        let from = out.len().saturating_sub(back);
                        let run: Vec<u8> = out[from..].iter().copied().take(run).collect();
                        out.extend(run);
                        out.push(self.below(256) as u8);
                    }
                }
                4 => out.extend((0..len).map(|_| b"ab"[self.below(2)])),
                _ => {
                    let from = out.len().saturating_sub(1 + self.below(70_000));
                    let run: Vec<u8> = out[from..].iter().copied().take(len).collect();
                    out.extend(run);
                }
            }
        }
        out.truncate(n);
        out
    }
}

/// 2 MB of a bit of everything.
pub fn some_file(dir: &Path) {
    let code = fs::read("/bin/bash").unwrap();
    let mut plain = Random(7).mixture(1_500_000, &code);
    plain.extend(vec![0; 500_000]);
    fs::write(dir.join("plain"), plain).unwrap();
}

/// A stream of four small artifacts, in a working directory as `build download` leaves it.
pub fn small_stream(dir: &Path) {
    fs::create_dir_all(dir.join("artifacts")).unwrap();
    some_file(dir);
    sh(
        dir,
        "export GNUPGHOME=$PWD/gnupg; mkdir -m 700 gnupg
         gpg --batch --quiet --passphrase '' --quick-gen-key test@example.invalid ed25519 sign 2>/dev/null
         for raw in a b c d; do (cat plain; echo $raw) > $raw.raw; done
         cd artifacts
         xz -c6 -T2 --block-size=512KiB ../a.raw > a.raw.xz; gzip -9 -c ../b.raw > b.raw.gz
         (cd ..; zip -q -9j - c.raw | cat) > c.raw.zip; xz -c --x86 --lzma2=preset=1 ../d.raw > d.raw.xz
         for file in *; do gpg --batch --quiet --detach-sign -o $file.sig $file; done
         sum() { sha256sum $1 | cut -c1-64; }
         {
             printf '{\"stream\":\"test\",\"metadata\":{},\"architectures\":{\"x86_64\":{\"artifacts\":{'
             comma=
             for file in a.raw.xz b.raw.gz c.raw.zip d.raw.xz; do
                 raw=${file%.*}
                 printf '%s\"%s\":{\"release\":\"1\",\"formats\":{\"raw.%s\":{\"disk\":{\"location\":\"https://example.invalid/%s\",\"signature\":\"https://example.invalid/%s.sig\",\"sha256\":\"%s\",\"uncompressed-sha256\":\"%s\"}}}}' \
                     \"$comma\" ${raw%.raw} ${file##*.} $file $file $(sum $file) $(sum ../$raw)
                 comma=,
             done
             printf '},\"images\":{}}}}'
         } > ../stream.json",
    );
}
