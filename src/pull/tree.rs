//! The directory that is being made: every change to it goes through here, and none goes outside.
//!
//! Names in layers are hostile until shown otherwise. A name is taken apart into its parent and its last part. The
//! parent is opened with `openat2` and `RESOLVE_IN_ROOT`, so that symbolic links on the way, absolute ones included, are
//! followed as they would be after a `chroot` and never lead out; the last part is never followed. On kernels and in
//! sandboxes without `openat2` the same is done one step at a time. Names with `..` are refused.
//!
//! Directories are writable and their owner's alone while the tree is made. [`Tree::finish`] gives them their modes and
//! times, which is also why those are right whatever was put into a directory later.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

/// How deep directories may be nested. Each level is an open file while the tree is walked.
const MAX_DEPTH: u32 = 400;

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

/// Owner, mode, time and extended attributes of what is made.
pub(super) struct Attributes<'a> {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
    pub(super) xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

/// What could not be done as the image says, and how often.
#[derive(Debug, Default)]
pub struct Notices(Vec<(String, String, u64)>);

impl Notices {
    /// Notes that `what` happened to the file at `path`.
    pub(super) fn add(&mut self, what: impl Into<String>, path: &[u8]) {
        let what = what.into();
        match self.0.iter_mut().find(|(known, ..)| *known == what) {
            Some((.., count)) => *count += 1,
            None => self.0.push((what, String::from_utf8_lossy(path).into_owned(), 1)),
        }
    }

    /// A line for each kind of thing.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(what, first, count)| match count {
            1 => format!("{first}: {what}"),
            _ => format!("{first} and {} more: {what}", count - 1),
        })
    }
}

/// What a directory gets in the end.
struct Final {
    mode: u32,
    mtime: (i64, u32),
    depth: u32,
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
    owners: Owners,
    /// The parent that was needed last: mostly it is needed again.
    last: Option<(Vec<u8>, Rc<Parent>)>,
    /// Directories by inode number; the tree is on one file system.
    dirs: HashMap<u64, Final>,
    /// What the current layer made, by directory: its whiteouts do not concern that.
    made: HashMap<u64, HashSet<Box<[u8]>>>,
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
    pub(super) fn new(root: OwnedFd, owners: Owners) -> Result<Self> {
        let ino = rustix::fs::fstat(&root)?.st_ino;
        let mut tree = Self {
            root: Rc::new(Parent { fd: root, ino }),
            owners,
            last: None,
            dirs: HashMap::new(),
            made: HashMap::new(),
            openat2: true,
            notices: Notices::default(),
        };
        tree.dirs.insert(ino, Final { mode: 0o755, mtime: UNKNOWN, depth: 0 });
        Ok(tree)
    }

    /// From here on things are of the next layer.
    pub(super) fn next_layer(&mut self) {
        self.made.clear();
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
            Err(Errno::NOENT) if create => self.walk(path, true)?,
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

    /// Opens a directory part by part, and makes what is missing if told so. Nobody else changes the tree, so that what
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
            let stat = match rustix::fs::statat(&dir.fd, &part[..], NEVER_FOLLOW) {
                Err(Errno::NOENT) if create => {
                    self.make_dir(&dir, &part)?;
                    rustix::fs::statat(&dir.fd, &part[..], NEVER_FOLLOW)?
                }
                stat => stat?,
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    let fd = rustix::fs::openat(&dir.fd, &part[..], AS_DIR, Mode::empty())?;
                    let ino = rustix::fs::fstat(&fd)?.st_ino;
                    ensure!(stack.len() <= MAX_DEPTH as usize, "nested more than {MAX_DEPTH} deep");
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
        let ino = rustix::fs::statat(&parent.fd, name, NEVER_FOLLOW)?.st_ino;
        // The number may have been that of a directory that is gone.
        self.made.remove(&ino);
        self.dirs.insert(ino, Final { mode: 0o755, mtime: UNKNOWN, depth });
        Ok(())
    }

    fn mark(&mut self, place: &Place<'_>) {
        self.made.entry(place.parent.ino).or_default().insert(place.name.into());
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
        if self.owners == Owners::Set {
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
        rustix::fs::fchmod(file, Mode::from_raw_mode(attributes.mode))?;
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
        let dev = rustix::fs::makedev(device.0, device.1);
        let mode = Mode::RUSR | Mode::WUSR;
        let made = self.replacing(place, |dir| rustix::fs::mknodat(dir, place.name, kind, mode, dev));
        match made {
            Err(e) if e.downcast_ref() == Some(&Errno::PERM) => {
                self.notices.add("a device or fifo, left out: making it is not permitted", place.path);
                Ok(())
            }
            Err(e) => Err(e),
            Ok(()) => self.finish_special(place, attributes, true),
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
        if self.owners == Owners::Set {
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
        let at = || format!("hard link to {:?}", String::from_utf8_lossy(target.path));
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
        if self.owners == Owners::Set {
            rustix::fs::fchown(&fd, Some(Uid::from_raw(attributes.uid)), Some(Gid::from_raw(attributes.gid)))
                .context("chown")?;
        }
        self.drop_xattrs(&fd, attributes)?;
        self.set_xattrs(path, attributes, |name, value| {
            rustix::fs::fsetxattr(&fd, name, value, XattrFlags::empty())
        });
        let ino = rustix::fs::fstat(&fd)?.st_ino;
        let Some(dir) = self.dirs.get_mut(&ino) else { bail!("a directory that nobody made") };
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
        for name in names[..len].split(|&b| b == 0).filter(|name| !name.is_empty() && *name != LABEL) {
            if !attributes.xattrs.iter().any(|(new, _)| new == name) {
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
        for (name, value) in attributes.xattrs.iter().filter(|(name, _)| name != LABEL) {
            if let Err(e) = set(name, value) {
                let name = String::from_utf8_lossy(name);
                self.notices.add(format!("extended attribute {name} not set: {e}"), path);
            }
        }
        if self.owners == Owners::Recorded && (attributes.uid, attributes.gid) != (0, 0) {
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
        let made = self.made.get(&parent.ino).is_some_and(|made| made.contains(place.name));
        self.hide(&parent.fd, place.name, made, 0)
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

    /// Removes `name`, but for what the current layer made in it, or all of it.
    fn hide(&self, parent: &OwnedFd, name: &[u8], made: bool, depth: u32) -> Result<()> {
        match rustix::fs::openat(parent, name, AS_DIR, Mode::empty()) {
            Ok(fd) => {
                self.hide_all(fd, depth + 1)?;
                if !made {
                    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
                        Ok(()) | Err(Errno::NOTEMPTY) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(Errno::NOTDIR | Errno::LOOP) if made => Ok(()),
            Err(Errno::NOTDIR | Errno::LOOP) => Ok(rustix::fs::unlinkat(parent, name, AtFlags::empty())?),
            Err(e) => Err(e.into()),
        }
    }

    fn hide_all(&self, dir: OwnedFd, depth: u32) -> Result<()> {
        ensure!(depth <= MAX_DEPTH + 1, "nested more than {MAX_DEPTH} deep");
        let ino = rustix::fs::fstat(&dir)?.st_ino;
        for name in names(dir.as_fd())? {
            let made = self.made.get(&ino).is_some_and(|made| made.contains(&name.0[..]));
            self.hide(&dir, &name.0, made, depth)?;
        }
        Ok(())
    }

    /// Gives the directories their modes and times, the root last. Returns what could not be done.
    pub(super) fn finish(self) -> Result<Notices> {
        self.finish_dir(rustix::fs::openat(&self.root.fd, c".", AS_DIR, Mode::empty())?)?;
        Ok(self.notices)
    }

    fn finish_dir(&self, fd: OwnedFd) -> Result<()> {
        for (name, kind) in names(fd.as_fd())? {
            if kind == FileType::Directory {
                self.finish_dir(rustix::fs::openat(&fd, &name[..], AS_DIR, Mode::empty())?)?;
            }
        }
        let Some(dir) = self.dirs.get(&rustix::fs::fstat(&fd)?.st_ino) else {
            bail!("a directory that nobody made")
        };
        rustix::fs::futimens(&fd, &timestamps(dir.mtime))?;
        Ok(rustix::fs::fchmod(&fd, Mode::from_raw_mode(dir.mode))?)
    }
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

/// What is in a directory, and of which kind each is.
fn names(dir: BorrowedFd<'_>) -> Result<Vec<(Box<[u8]>, FileType)>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name: &CStr = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let kind = match entry.file_type() {
            // Not all file systems tell.
            FileType::Unknown => {
                let stat: Stat = rustix::fs::statat(dir, name, NEVER_FOLLOW)?;
                FileType::from_raw_mode(stat.st_mode)
            }
            kind => kind,
        };
        names.push((name.to_bytes().into(), kind));
    }
    Ok(names)
}

/// Removes `name` of `parent` with all that is in it. Directories that their owner may not enter are no obstacle to him.
pub(super) fn remove(parent: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e.into()),
    }
    let open = || rustix::fs::openat(parent, name, AS_DIR, Mode::empty());
    let dir = match open() {
        Err(Errno::ACCESS) => {
            rustix::fs::chmodat(parent, name, UNFINISHED, AtFlags::empty())?;
            open()?
        }
        dir => dir?,
    };
    let mut writable = false;
    for (name, _) in names(dir.as_fd())? {
        let removed = remove(dir.as_fd(), &name);
        match removed {
            Err(e) if !writable && e.downcast_ref() == Some(&Errno::ACCESS) => {
                rustix::fs::fchmod(&dir, UNFINISHED)?;
                writable = true;
                remove(dir.as_fd(), &name)?;
            }
            removed => removed?,
        }
    }
    Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Attributes<'static> = Attributes { mode: 0o644, uid: 0, gid: 0, mtime: (1, 0), xattrs: &[] };

    fn tree(openat2: bool) -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        let root = rustix::fs::open(dir.path().join("root"), AS_DIR, Mode::empty()).unwrap();
        let mut tree = Tree::new(root, Owners::Dropped).unwrap();
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

    #[test]
    fn owners_are_recorded_as_a_protocol_buffer() {
        assert_eq!(recorded(0, 0), b"");
        assert_eq!(recorded(1, 300), b"\x08\x01\x10\xac\x02");
        assert_eq!(recorded(0, 5), b"\x10\x05");
    }

    #[test]
    fn depth_is_bounded() {
        let (_dir, mut tree) = tree(true);
        let path = "d/".repeat(MAX_DEPTH as usize);
        assert!(tree.place(format!("{path}f").as_bytes()).is_ok());
        assert!(tree.place(format!("{path}d/f").as_bytes()).is_err());
    }
}
