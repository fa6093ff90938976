//! Numbers: in the headers of formats, where callers use constant offsets into buffers of constant length, or have
//! checked; and as people write sizes.

macro_rules! number {
    ($name:ident, $type:ty, $from:ident, $text:literal) => {
        #[doc = $text]
        pub fn $name(bytes: &[u8], at: usize) -> $type {
            let mut number = [0; size_of::<$type>()];
            number.copy_from_slice(&bytes[at..at + size_of::<$type>()]);
            <$type>::$from(number)
        }
    };
}

number!(le16, u16, from_le_bytes, "The little-endian `u16` at `at`, which must be there.");
number!(le32, u32, from_le_bytes, "The little-endian `u32` at `at`, which must be there.");
number!(le64, u64, from_le_bytes, "The little-endian `u64` at `at`, which must be there.");
number!(be32, u32, from_be_bytes, "The big-endian `u32` at `at`, which must be there.");
number!(be64, u64, from_be_bytes, "The big-endian `u64` at `at`, which must be there.");

/// Parses `512M`, `2G`, `1048576`: binary multiples.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("not a size: {text:?}")),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_shl(shift).filter(|m| m >> shift == n))
        .ok_or_else(|| format!("not a size: {text:?}"))
}
