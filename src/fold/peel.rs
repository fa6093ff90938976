//! temporary
use crate::io::{SparseWriter, scratch_file};
use crate::source::{File, Source};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
/// t
pub struct Peeled {
    /// t
    pub form: Arc<dyn Source>,
    /// t
    pub member: Option<String>,
}
/// t
pub fn peel(mut file: std::fs::File, name: &str, scratch: &Path, _max: u64) -> io::Result<Peeled> {
    let mut member = None;
    let mut r: Box<dyn Read> = if name.ends_with(".xz") {
        Box::new(liblzma::read::XzDecoder::new_multi_decoder(file))
    } else if name.ends_with(".gz") {
        Box::new(flate2::read::MultiGzDecoder::new(file))
    } else if name.ends_with(".zip") {
        let mut h = [0; 30];
        file.read_exact(&mut h)?;
        let n = u16::from_le_bytes([h[26], h[27]]) as usize;
        let e = u16::from_le_bytes([h[28], h[29]]) as usize;
        let mut v = vec![0; n + e];
        file.read_exact(&mut v)?;
        member = Some(String::from_utf8_lossy(&v[..n]).into_owned());
        Box::new(flate2::read::DeflateDecoder::new(file))
    } else {
        Box::new(zstd::Decoder::new(file)?)
    };
    let mut out = SparseWriter::new(scratch_file(scratch)?);
    io::copy(&mut r, &mut out)?;
    Ok(Peeled { form: Arc::new(File::new(out.finish()?)?), member })
}
