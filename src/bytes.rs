//! Numbers in the headers of formats. Callers use constant offsets into buffers of constant length, or have checked.

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
