//! The directory that is being made: every change to it goes through here, and none goes outside.
//!
//! Names in layers are hostile until shown otherwise. A name is taken apart into its parent and its last part. The
//! parent is opened with `openat2` and `RESOLVE_IN_ROOT`, so that symbolic links on the way, absolute ones included, are
//! followed as they would be after a `chroot` and never lead out; the last part is never followed. On kernels and in
//! sandboxes without `openat2` the same is done one step at a time. Names with `..` are refused.
//!
//! Directories are writable and their owner's alone while the tree is made. [`Tree::finish`] gives them their modes and
//! times, which is also why those are right whatever was put into a directory later.
//!
//! Layers are hostile in what they cost, too. A whiteout costs as much as it removes: a directory in which nothing of the
//! lower layers is left is not searched again for the same layer. Directories are read entry by entry, and what must be
//! remembered of a name or a directory has the same few bytes whatever it is called.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::bounded::shown;

/// How deep directories may be nested. Each level is an open file while the tree is walked.
const MAX_DEPTH: u16 = 400;

/// How deep directories may be nested that are removed, which others may have made. Each level is an open file, of which a
/// process has 1024 as a rule.
const MAX_REMOVED_DEPTH: u16 = 900;

/// How many symbolic links are followed for one name, as in the kernel.
const MAX_LINKS: usize = 40;

/// The mode of a directory until all is there.
const UNFINISHED: Mode = Mode::RWXU;

/// The time of a directory that no layer describes: the same image makes the same tree.
const UNKNOWN: (i64, u32) = (0, 0);

/// What is opened to be a starting point for names.
const AS_DIR: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);

/// What a name may stand for.
const NEVER_FOLLOW: AtFlags = AtFlags::SYMLINK_NOFOLLOW;

/// The label that the policy of the host gives, not the image.
const LABEL: &[u8] = b"security.selinux";

/// The capabilities that a program has whoever starts it.
const CAPABILITY: &[u8] = b"security.capability";

/// The mode bits that make a program run as its owner or group.
const SETID: u32 = 0o6000;

/// The most kinds of things that are told of an image: more than there are reasons, but an image may give every file an
/// attribute of another name.
const MAX_KINDS: usize = 100;

/// What is told of the rest.
const OTHER_KINDS: &str = "other things not done as the image says";

/// Where owners are recorded that cannot be set: a protocol buffer, of <https://github.com/rootless-containers/proto>.
const RECORDED: &[u8] = b"user.rootlesscontainers";

/// What is done about owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// They are set, which takes root.
    Set,
    /// All belongs to who runs this; the owners are recorded in `user.rootlesscontainers`, as umoci does it.
    Recorded,
    /// All belongs to who runs this.
    Dropped,
}

/// What is made as the image says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// What is done about owners.
    pub owners: Owners,
    /// Keep the bits and capabilities that let a program do more than the user who starts it.
    pub setuid: bool,
    /// Make devices.
    pub devices: bool,
}

/// Owner, mode, time and extended attributes of what is made.
pub(super) struct Attributes<'a> {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
    pub(super) xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

/// What could not be done as the image says, and how often: the first file, and how many there are.
#[derive(Debug, Default)]
pub struct Notices(BTreeMap<String, (String, u64)>);

impl Notices {
    /// Notes that `what` happened to the file at `path`.
    pub(super) fn add(&mut self, what: impl Into<String>, path: &[u8]) {
        let mut what = what.into();
        if self.0.len() >= MAX_KINDS && !self.0.contains_key(&what) {
            what = OTHER_KINDS.into();
        }
        self.0.entry(what).or_insert_with(|| (shown(path), 0)).1 += 1;
    }

    /// A line for each kind of thing.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(what, (first, count))| match count {
            1 => format!("{first}: {what}"),
            _ => format!("{first} and {} more: {what}", count - 1),
        })
    }
}

/// A directory that was made.
struct Made {
    /// What it gets in the end.
    mtime: (i64, u32),
    mode: u32,
    depth: u16,
    /// Tells it from those that had its inode number before it.
    serial: u32,
    /// The last layer of which it is known that nothing of the layers below is left in it.
    cleared: u32,
}

/// The digest of a name in a directory: names that a layer made may be many, and long.
type Key = [u8; 16];

fn key(serial: u32, name: &[u8]) -> Key {
    let mut key = Key::default();
    blake3::Hasher::new().update(&serial.to_le_bytes()).update(name).finalize_xof().fill(&mut key);
    key
}

/// An open directory.
pub(super) struct Parent {
    fd: OwnedFd,
    ino: u64,
}

/// A name in the tree: its parent directory, open, and its last part.
pub(super) struct Place<'a> {
    pub(super) parent: Rc<Parent>,
    pub(super) name: &'a [u8],
    /// All of it, for messages.
    pub(super) path: &'a [u8],
}

/// A directory that is being filled.
pub(super) struct Tree {
    root: Rc<Parent>,
    rules: Rules,
    /// The parent that was needed last: mostly it is needed again.
    last: Option<(Vec<u8>, Rc<Parent>)>,
    /// Directories by inode number; the tree is on one file system.
    dirs: HashMap<u64, Made>,
    /// How many directories have been made.
    serial: u32,
    /// How many directories have been made because something was to be in them.
    pub(super) implied: u64,
    /// The number of the current layer.
    layer: u32,
    /// What the current layer made: its whiteouts do not concern that.
    made: HashSet<Key>,
    /// Something in the tree lets those who can reach it do more than they could before.
    risky: bool,
    /// Whether the kernel has `openat2`.
    openat2: bool,
    pub(super) notices: Notices,
}

/// A path, cleaned: no `/` at either end or twice, no `.`. Refuses `..`, and all that is no path at all.
pub(super) fn clean(path: &[u8]) -> Result<Vec<u8>> {
    let mut clean = Vec::with_capacity(path.len());
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => continue,
            b".." => bail!("a path with \"..\""),
            _ => {}
        }
        if !clean.is_empty() {
            clean.push(b'/');
        }
        clean.extend_from_slice(part);
    }
    Ok(clean)
}

impl Tree {
    /// Fills the directory `root`, which is empty and its owner's alone.
    pub(super) fn new(root: OwnedFd, rules: Rules) -> Result<Self> {
        let ino = rustix::fs::fstat(&root)?.st_ino;
        let mut tree = Self {
            root: Rc::new(Parent { fd: root, ino }),
            rules,
            last: None,
            dirs: HashMap::new(),
            serial: 0,
            implied: 0,
            layer: 0,
            made: HashSet::new(),
            risky: false,
            openat2: true,
            notices: Notices::default(),
        };
        tree.know(ino, 0);
        Ok(tree)
    }

    /// From here on things are of the next layer.
    pub(super) fn next_layer(&mut self) {
        self.layer += 1;
        self.made = HashSet::new();
    }

    /// Remembers a new directory.
    fn know(&mut self, ino: u64, depth: u16) {
        self.serial += 1;
        let (serial, cleared) = (self.serial, self.layer);
        self.dirs.insert(ino, Made { mtime: UNKNOWN, mode: 0o755, depth, serial, cleared });
    }

    /// The place that a clean path names; none for the root itself. Parents that are missing are made.
    pub(super) fn place<'a>(&mut self, path: &'a [u8]) -> Result<Option<Place<'a>>> {
        if path.is_empty() {
            return Ok(None);
        }
        let (dir, name) = match path.iter().rposition(|&b| b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&[][..], path),
        };
        Ok(Some(Place { parent: self.enter(dir, true)?, name, path }))
    }

    /// The place that a clean path names, if its parent is there.
    pub(super) fn existing<'a>(&mut self, path: &'a [u8]) -> Result<Option<Place<'a>>> {
        let (dir, name) = match path.iter().rposition(|&b| b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&[][..], path),
        };
        match self.enter(dir, false) {
            Ok(parent) => Ok(Some(Place { parent, name, path })),
            Err(e) if is_missing(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Opens a directory.
    fn enter(&mut self, path: &[u8], create: bool) -> Result<Rc<Parent>> {
        if path.is_empty() {
            return Ok(Rc::clone(&self.root));
        }
        if let Some((last, parent)) = &self.last
            && last == path
        {
            return Ok(Rc::clone(parent));
        }
        let parent = match self.open_at_once(path) {
            Err(Errno::NOSYS | Errno::PERM | Errno::NAMETOOLONG | Errno::AGAIN) => self.walk(path, create)?,
            Err(Errno::NOENT | Errno::NOTDIR) if create => self.walk(path, true)?,
            fd => {
                let fd = fd?;
                let ino = rustix::fs::fstat(&fd)?.st_ino;
                Rc::new(Parent { fd, ino })
            }
        };
        self.last = Some((path.to_vec(), Rc::clone(&parent)));
        Ok(parent)
    }

    fn open_at_once(&mut self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        if !self.openat2 {
            return Err(Errno::NOSYS);
        }
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        // Not NOFOLLOW: the last part of a parent may be a link, too.
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat2(&self.root.fd, path, flags, Mode::empty(), resolve);
        // Sandboxes that do not know the call refuse it.
        if matches!(opened, Err(Errno::NOSYS | Errno::PERM)) {
            self.openat2 = false;
        }
        opened
    }

    /// Opens a directory part by part. With `create`, makes what is missing, also in the place of a file of a lower layer, as
    /// overlayfs shows it. Nobody else changes the tree, so that what
    /// was found to be a directory still is one.
    fn walk(&mut self, path: &[u8], create: bool) -> Result<Rc<Parent>> {
        let mut stack = vec![Rc::clone(&self.root)];
        let mut todo: Vec<Vec<u8>> = path.split(|&b| b == b'/').rev().map(Vec::from).collect();
        let mut links = 0;
        while let Some(part) = todo.pop() {
            let Some(dir) = stack.last().cloned() else { bail!("no directory to begin with") };
            match &part[..] {
                b"" | b"." => continue,
                b".." => {
                    if stack.len() > 1 {
                        stack.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let kind = |found: rustix::io::Result<rustix::fs::Stat>| {
                found.map(|stat| FileType::from_raw_mode(stat.st_mode))
            };
            let mut found = kind(rustix::fs::statat(&dir.fd, &part[..], NEVER_FOLLOW));
            if create {
                let is_file =
                    matches!(found, Ok(kind) if !matches!(kind, FileType::Directory | FileType::Symlink));
                let is_replaced = is_file && !self.is_made(dir.ino, &part)?;
                if is_replaced {
                    rustix::fs::unlinkat(&dir.fd, &part[..], AtFlags::empty())?;
                }
                if is_replaced || found == Err(Errno::NOENT) {
                    self.make_dir(&dir, &part)?;
                    self.implied += 1;
                    found = Ok(FileType::Directory);
                }
            }
            match found? {
                FileType::Directory => {
                    let fd = rustix::fs::openat(&dir.fd, &part[..], AS_DIR, Mode::empty())?;
                    let ino = rustix::fs::fstat(&fd)?.st_ino;
                    ensure!(stack.len() <= usize::from(MAX_DEPTH), "nested more than {MAX_DEPTH} deep");
                    stack.push(Rc::new(Parent { fd, ino }));
                }
                FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target = rustix::fs::readlinkat(&dir.fd, &part[..], Vec::new())?.into_bytes();
                    if target.starts_with(b"/") {
                        stack.truncate(1);
                    }
                    todo.extend(target.split(|&b| b == b'/').rev().map(Vec::from));
                }
                _ => return Err(Errno::NOTDIR.into()),
            }
        }
        stack.pop().context("no directory to begin with")
    }

    /// Makes a directory that no layer has described yet.
    fn make_dir(&mut self, parent: &Parent, name: &[u8]) -> Result<()> {
        let depth = self.dirs.get(&parent.ino).map_or(0, |dir| dir.depth) + 1;
        ensure!(depth <= MAX_DEPTH, "nested more than {MAX_DEPTH} deep");
        rustix::fs::mkdirat(&parent.fd, name, UNFINISHED)?;
        self.know(rustix::fs::statat(&parent.fd, name, NEVER_FOLLOW)?.st_ino, depth);
        Ok(())
    }

    fn mark(&mut self, place: &Place<'_>) {
        if let Some(dir) = self.dirs.get(&place.parent.ino) {
            self.made.insert(key(dir.serial, place.name));
        }
    }

    /// Runs `make`, and once more after what is in its place has been removed if something is.
    fn replacing<T>(
        &mut self,
        place: &Place<'_>,
        mut make: impl FnMut(&OwnedFd) -> rustix::io::Result<T>,
    ) -> Result<T> {
        let made = match make(&place.parent.fd) {
            Err(Errno::EXIST) => {
                self.remove(place)?;
                make(&place.parent.fd)?
            }
            made => made?,
        };
        self.mark(place);
        Ok(made)
    }

    /// Removes what is at `place`, if anything is.
    fn remove(&mut self, place: &Place<'_>) -> Result<()> {
        // What was found through it may be somewhere else now.
        self.last = None;
        remove(place.parent.fd.as_fd(), place.name)
    }

    /// A new and empty file, in the place of what is there.
    pub(super) fn file(&mut self, place: &Place<'_>) -> Result<OwnedFd> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        self.replacing(place, |dir| rustix::fs::openat(dir, place.name, flags, Mode::RUSR | Mode::WUSR))
    }

    /// Gives an open file its attributes, once its content is there.
    pub(super) fn finish_file(
        &mut self,
        place: &Place<'_>,
        file: &OwnedFd,
        attributes: &Attributes<'_>,
    ) -> Result<()> {
        // In this order: another owner drops capabilities and setuid, and attributes of a read-only file are refused.
        if self.rules.owners == Owners::Set {
            rustix::fs::fchown(
                file,
                Some(Uid::from_raw(attributes.uid)),
                Some(Gid::from_raw(attributes.gid)),
            )
            .context("chown")?;
        }
        self.set_xattrs(place.path, attributes, |name, value| {
            rustix::fs::fsetxattr(file, name, value, XattrFlags::empty())
        });
        let mode = if self.rules.setuid { attributes.mode } else { attributes.mode & !SETID };
        self.risky |= mode & SETID != 0;
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode))?;
        rustix::fs::futimens(file, &timestamps(attributes.mtime))?;
        Ok(())
    }

    /// A symbolic link.
    pub(super) fn symlink(
        &mut self,
        place: &Place<'_>,
        target: &[u8],
        attributes: &Attributes<'_>,
    ) -> Result<()> {
        self.replacing(place, |dir| rustix::fs::symlinkat(target, dir, place.name))?;
        self.finish_special(place, attributes, false)
    }

    /// A device, or a fifo. Not making one because that is not allowed, is fine.
    pub(super) fn node(
        &mut self,
        place: &Place<'_>,
        kind: FileType,
        device: (u32, u32),
        attributes: &Attributes<'_>,
    ) -> Result<()> {
        let is_device = kind != FileType::Fifo;
        if is_device && !self.rules.devices {
            return Ok(());
        }
        let dev = rustix::fs::makedev(device.0, device.1);
        let mode = Mode::RUSR | Mode::WUSR;
        let made = self.replacing(place, |dir| rustix::fs::mknodat(dir, place.name, kind, mode, dev));
        match made {
            Err(e) if e.downcast_ref() == Some(&Errno::PERM) => {
                self.notices.add("a device or fifo, left out: making it is not permitted", place.path);
                Ok(())
            }
            Err(e) => Err(e),
            Ok(()) => {
                self.risky |= is_device;
                self.finish_special(place, attributes, true)
            }
        }
    }

    /// Gives what cannot be opened its attributes.
    fn finish_special(
        &mut self,
        place: &Place<'_>,
        attributes: &Attributes<'_>,
        has_mode: bool,
    ) -> Result<()> {
        let (dir, name) = (&place.parent.fd, place.name);
        if self.rules.owners == Owners::Set {
            let owner = (Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)));
            rustix::fs::chownat(dir, name, owner.0, owner.1, NEVER_FOLLOW).context("chown")?;
        }
        // There is no call for this that takes a directory and a name.
        let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
        path.extend_from_slice(name);
        self.set_xattrs(place.path, attributes, |name, value| {
            rustix::fs::lsetxattr(&path[..], name, value, XattrFlags::empty())
        });
        if has_mode {
            // Follows links, but this is none: it has just been made.
            rustix::fs::chmodat(dir, name, Mode::from_raw_mode(attributes.mode), AtFlags::empty())?;
        }
        rustix::fs::utimensat(dir, name, &timestamps(attributes.mtime), NEVER_FOLLOW)?;
        Ok(())
    }

    /// A second name for what is at `target`.
    pub(super) fn hard_link(&mut self, place: &Place<'_>, target: &Place<'_>) -> Result<()> {
        let link = || {
            // Without following: a link to a symbolic link is one to that, and not to where it leads.
            rustix::fs::linkat(&target.parent.fd, target.name, &place.parent.fd, place.name, AtFlags::empty())
        };
        let at = || format!("hard link to {:?}", shown(target.path));
        match link() {
            Err(Errno::EXIST) => {
                let stat = |p: &Place<'_>| rustix::fs::statat(&p.parent.fd, p.name, NEVER_FOLLOW);
                if stat(target).with_context(at)?.st_ino != stat(place).with_context(at)?.st_ino {
                    self.remove(place)?;
                    link().with_context(at)?;
                }
            }
            linked => linked.with_context(at)?,
        }
        self.mark(place);
        Ok(())
    }

    /// A directory; one that is there already gets the attributes of the new one, and keeps what is in it.
    pub(super) fn dir(&mut self, place: Option<&Place<'_>>, attributes: &Attributes<'_>) -> Result<()> {
        let fd = match place {
            None => rustix::fs::openat(&self.root.fd, c".", AS_DIR, Mode::empty())?,
            Some(place) => {
                let there = match rustix::fs::statat(&place.parent.fd, place.name, NEVER_FOLLOW) {
                    Ok(stat) => Some(FileType::from_raw_mode(stat.st_mode)),
                    Err(Errno::NOENT) => None,
                    Err(e) => return Err(e.into()),
                };
                if there.is_some_and(|kind| kind != FileType::Directory) {
                    self.remove(place)?;
                }
                if there != Some(FileType::Directory) {
                    self.make_dir(&place.parent, place.name)?;
                }
                self.mark(place);
                rustix::fs::openat(&place.parent.fd, place.name, AS_DIR, Mode::empty())?
            }
        };
        let path = place.map_or(&b"."[..], |place| place.path);
        if self.rules.owners == Owners::Set {
            rustix::fs::fchown(&fd, Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))
                .context("chown")?;
        }
        self.drop_xattrs(&fd, attributes)?;
        self.set_xattrs(path, attributes, |name, value| {
            rustix::fs::fsetxattr(&fd, name, value, XattrFlags::empty())
        });
        let ino = rustix::fs::fstat(&fd)?.st_ino;
        let dir = self.known(ino)?;
        (dir.mode, dir.mtime) = (attributes.mode, attributes.mtime);
        Ok(())
    }

    /// Removes the extended attributes that a directory had from a lower layer.
    fn drop_xattrs(&self, fd: &OwnedFd, attributes: &Attributes<'_>) -> Result<()> {
        let mut names = match rustix::fs::flistxattr_query(fd) {
            Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(()),
            len => vec![0; len?],
        };
        let len = rustix::fs::flistxattr(fd, &mut names[..])?;
        let new: HashSet<&[u8]> = attributes.xattrs.iter().map(|(name, _)| &name[..]).collect();
        for name in names[..len].split(|&b| b == 0).filter(|name| !name.is_empty() && *name != LABEL) {
            if !new.contains(name) {
                match rustix::fs::fremovexattr(fd, name) {
                    // Those that this process may not touch, it has not made either.
                    Ok(()) | Err(Errno::PERM | Errno::NODATA | Errno::OPNOTSUPP) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(())
    }

    fn set_xattrs(
        &mut self,
        path: &[u8],
        attributes: &Attributes<'_>,
        set: impl Fn(&[u8], &[u8]) -> rustix::io::Result<()>,
    ) {
        let keep = |name: &[u8]| name != LABEL && (self.rules.setuid || name != CAPABILITY);
        for (name, value) in attributes.xattrs.iter().filter(|(name, _)| keep(name)) {
            match set(name, value) {
                Ok(()) => self.risky |= name == CAPABILITY,
                Err(e) => {
                    let what = format!("extended attribute {} not set: {e}", shown(name));
                    self.notices.add(what, path);
                }
            }
        }
        if self.rules.owners == Owners::Recorded && (attributes.uid, attributes.gid) != (0, 0) {
            match set(RECORDED, &recorded(attributes.uid, attributes.gid)) {
                // Links and devices cannot have it, and read-only file systems of the kernel have none at all.
                Ok(()) => {}
                Err(e) => self.notices.add(format!("owner not recorded: {e}"), path),
            }
        }
    }

    /// Hides what lower layers have at `place`.
    pub(super) fn whiteout(&mut self, place: &Place<'_>) -> Result<()> {
        self.last = None;
        let parent = Rc::clone(&place.parent);
        let made = self.is_made(parent.ino, place.name)?;
        self.hide(parent.fd.as_fd(), place.name, made, 0).map(drop)
    }

    /// Hides what lower layers have in the directory of this clean path; one that no layer has, has nothing to hide.
    pub(super) fn opaque(&mut self, path: &[u8]) -> Result<()> {
        let dir = match self.enter(path, false) {
            Err(e) if is_missing(&e) => return Ok(()),
            dir => dir?,
        };
        self.last = None;
        self.hide_all(rustix::fs::openat(&dir.fd, c".", AS_DIR, Mode::empty())?, 0)
    }

    fn known(&mut self, ino: u64) -> Result<&mut Made> {
        self.dirs.get_mut(&ino).context("a directory that nobody made")
    }

    /// Whether the current layer made `name` in the directory `ino`.
    fn is_made(&mut self, ino: u64, name: &[u8]) -> Result<bool> {
        let key = key(self.known(ino)?.serial, name);
        Ok(self.made.contains(&key))
    }

    /// Removes `name`, but for what the current layer made in it, or all of it. True if it is gone.
    fn hide(&mut self, parent: BorrowedFd<'_>, name: &[u8], made: bool, depth: u16) -> Result<bool> {
        match rustix::fs::openat(parent, name, AS_DIR, Mode::empty()) {
            Ok(fd) => {
                self.hide_all(fd, depth + 1)?;
                if made {
                    return Ok(false);
                }
                match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
                    Err(Errno::NOTEMPTY) => Ok(false),
                    removed => Ok(removed.map(|()| true)?),
                }
            }
            Err(Errno::NOENT) => Ok(false),
            Err(Errno::NOTDIR | Errno::LOOP) if made => Ok(false),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                Ok(rustix::fs::unlinkat(parent, name, AtFlags::empty()).map(|()| true)?)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Removes all that lower layers have in `dir`.
    fn hide_all(&mut self, dir: OwnedFd, depth: u16) -> Result<()> {
        ensure!(depth <= MAX_DEPTH + 1, "nested more than {MAX_DEPTH} deep");
        let (ino, layer) = (rustix::fs::fstat(&dir)?.st_ino, self.layer);
        let known = self.known(ino)?;
        if known.cleared == layer {
            return Ok(());
        }
        known.cleared = layer;
        each(&mut Dir::new(dir)?, |dir, name, _| {
            let made = self.is_made(ino, name)?;
            self.hide(dir, name, made, depth)
        })
    }

    /// Gives the directories their modes and times, the root last. What the tree has that is a risk to the machine where
    /// others can reach it, is for the owner of the root alone unless the place of the tree is `closed` to others.
    pub(super) fn finish(mut self, closed: bool) -> Result<Finished> {
        let root = rustix::fs::openat(&self.root.fd, c".", AS_DIR, Mode::empty())?;
        let withheld = self.risky && !closed;
        if withheld {
            let ino = self.root.ino;
            self.known(ino)?.mode &= 0o700;
            // The image may have given it to somebody who has an account here.
            let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
            rustix::fs::fchown(&root, Some(user), Some(group)).context("chown")?;
        }
        self.finish_dir(root)?;
        Ok(Finished { notices: self.notices, withheld })
    }

    fn finish_dir(&mut self, fd: OwnedFd) -> Result<()> {
        let mut all = Dir::new(fd)?;
        each(&mut all, |dir, name, kind| {
            if kind == FileType::Directory {
                self.finish_dir(rustix::fs::openat(dir, name, AS_DIR, Mode::empty())?)?;
            }
            Ok(false)
        })?;
        let fd = all.fd()?;
        let dir = self.known(rustix::fs::fstat(fd)?.st_ino)?;
        rustix::fs::futimens(fd, &timestamps(dir.mtime))?;
        Ok(rustix::fs::fchmod(fd, Mode::from_raw_mode(dir.mode))?)
    }
}

/// What came of a tree.
pub struct Finished {
    /// What could not be done as the image says.
    pub notices: Notices,
    /// Only its owner may enter the tree, although the image lets others.
    pub withheld: bool,
}

/// Whether a directory could not be opened because there is none.
fn is_missing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(&(Errno::NOENT | Errno::NOTDIR)))
}

/// The message `Resource { uid = 1; gid = 2 }`; zeros are left out.
fn recorded(uid: u32, gid: u32) -> Vec<u8> {
    let mut message = Vec::new();
    for (field, mut value) in [(1u8, uid), (2, gid)] {
        if value != 0 {
            message.push(field << 3);
            while value >= 0x80 {
                message.push(value as u8 | 0x80);
                value >>= 7;
            }
            message.push(value as u8);
        }
    }
    message
}

fn timestamps((tv_sec, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec, tv_nsec: nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}

/// Calls `act` for everything in a directory: with the directory, the name, and the kind. Where it says that it removed
/// something, the directory is read again, since not all file systems list the rest of it correctly.
fn each(dir: &mut Dir, mut act: impl FnMut(BorrowedFd<'_>, &[u8], FileType) -> Result<bool>) -> Result<()> {
    loop {
        let mut removed = false;
        while let Some(entry) = dir.read() {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let kind = match entry.file_type() {
                // Not all file systems tell.
                FileType::Unknown => {
                    FileType::from_raw_mode(rustix::fs::statat(dir.fd()?, name, NEVER_FOLLOW)?.st_mode)
                }
                kind => kind,
            };
            removed |= act(dir.fd()?, name.to_bytes(), kind)?;
        }
        if !removed {
            return Ok(());
        }
        dir.rewind();
    }
}

/// Removes `name` of `parent` with all that is in it. Directories that their owner may not enter are no obstacle to him.
pub(super) fn remove(parent: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    remove_at(parent, name, 0).map(drop)
}

/// False where there was nothing to remove.
fn remove_at(parent: BorrowedFd<'_>, name: &[u8], depth: u16) -> Result<bool> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) => return Ok(true),
        Err(Errno::NOENT) => return Ok(false),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e.into()),
    }
    ensure!(depth <= MAX_REMOVED_DEPTH, "nested more than {MAX_REMOVED_DEPTH} deep");
    let open = || rustix::fs::openat(parent, name, AS_DIR, Mode::empty());
    let dir = match open() {
        Err(Errno::ACCESS) => {
            rustix::fs::chmodat(parent, name, UNFINISHED, AtFlags::empty())?;
            open()?
        }
        dir => dir?,
    };
    let mut writable = false;
    each(&mut Dir::new(dir)?, |dir, name, _| match remove_at(dir, name, depth + 1) {
        Err(e) if !writable && e.downcast_ref() == Some(&Errno::ACCESS) => {
            rustix::fs::fchmod(dir, UNFINISHED)?;
            writable = true;
            remove_at(dir, name, depth + 1)
        }
        removed => removed,
    })?;
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Attributes<'static> = Attributes { mode: 0o644, uid: 0, gid: 0, mtime: (1, 0), xattrs: &[] };

    fn tree(openat2: bool) -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        let root = rustix::fs::open(dir.path().join("root"), AS_DIR, Mode::empty()).unwrap();
        let rules = Rules { owners: Owners::Dropped, setuid: true, devices: true };
        let mut tree = Tree::new(root, rules).unwrap();
        tree.openat2 = openat2;
        (dir, tree)
    }

    /// Both ways to open a parent lead to the same place, which is in the tree.
    #[test]
    fn links_lead_where_they_would_after_chroot() {
        for openat2 in [true, false] {
            let (dir, mut tree) = tree(openat2);
            let outside = dir.path().join("outside");
            std::fs::create_dir(&outside).unwrap();
            let there = dir.path().to_str().unwrap();
            for (name, target) in [
                ("absolute", "/usr"),
                ("up", "../../../.."),
                ("out", "../outside"),
                ("far", outside.to_str().unwrap()),
                ("chain", "absolute/../chained"),
                ("loop", "loop"),
            ] {
                let place = tree.place(name.as_bytes()).unwrap().unwrap();
                tree.symlink(&place, target.as_bytes(), &PLAIN).unwrap();
            }
            for (path, real) in [
                ("absolute/a", "usr/a".to_string()),
                ("up/b", "b".to_string()),
                ("out/c", "outside/c".to_string()),
                ("far/d", format!("{}/outside/d", there.trim_start_matches('/'))),
                ("chain/e", "chained/e".to_string()),
                ("new/dir/f", "new/dir/f".to_string()),
            ] {
                let place = tree.place(path.as_bytes()).unwrap().unwrap();
                tree.file(&place).unwrap();
                assert!(dir.path().join("root").join(&real).is_file(), "{path} {openat2}");
            }
            assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
            let error = tree.place(b"loop/x").err().unwrap();
            assert_eq!(error.downcast_ref(), Some(&Errno::LOOP), "{openat2}");
            assert!(tree.existing(b"nothing/here").unwrap().is_none());
        }
    }

    #[test]
    fn paths_are_cleaned_or_refused() {
        assert_eq!(clean(b"./a//b/./c/").unwrap(), b"a/b/c");
        assert_eq!(clean(b"/").unwrap(), b"");
        assert_eq!(clean(b"/a...").unwrap(), b"a...");
        assert!(clean(b"a/../b").is_err());
        assert!(clean(b"..").is_err());
    }

    /// What is removed may have been made by others.
    #[test]
    fn removing_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let top = rustix::fs::open(dir.path(), AS_DIR, Mode::empty()).unwrap();
        let deep = |count: u16| {
            let mut at = rustix::io::fcntl_dupfd_cloexec(&top, 0).unwrap();
            for _ in 0..count {
                rustix::fs::mkdirat(&at, c"d", UNFINISHED).unwrap();
                at = rustix::fs::openat(&at, c"d", AS_DIR, Mode::empty()).unwrap();
            }
        };
        deep(MAX_REMOVED_DEPTH);
        remove(top.as_fd(), b"d").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        deep(MAX_REMOVED_DEPTH + 2);
        let e = remove(top.as_fd(), b"d").unwrap_err().to_string();
        assert_eq!(e, "nested more than 900 deep");
    }

    #[test]
    fn kinds_of_notices_are_bounded() {
        let mut notices = Notices::default();
        for n in 0..1_000_000 {
            notices.add(format!("kind {n:07}"), b"file");
        }
        notices.add("kind 0000003", b"other");
        let lines: Vec<_> = notices.lines().collect();
        assert_eq!(lines.len(), MAX_KINDS + 1);
        assert_eq!(lines[3], "file and 1 more: kind 0000003");
        assert_eq!(lines[MAX_KINDS], format!("file and 999899 more: {OTHER_KINDS}"));
    }

    #[test]
    fn owners_are_recorded_as_a_protocol_buffer() {
        assert_eq!(recorded(0, 0), b"");
        assert_eq!(recorded(1, 300), b"\x08\x01\x10\xac\x02");
        assert_eq!(recorded(0, 5), b"\x10\x05");
    }

    #[test]
    fn depth_is_bounded() {
        let (_dir, mut tree) = tree(true);
        let path = "d/".repeat(MAX_DEPTH.into());
        assert!(tree.place(format!("{path}f").as_bytes()).is_ok());
        assert!(tree.place(format!("{path}d/f").as_bytes()).is_err());
    }
}
