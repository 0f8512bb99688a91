package servers

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
)

// place is where a server's files are and who owns them.
type place struct {
	id    string // names the server in process lists, derived from dir
	dir   string // what the caller named, absolute
	home  string // what the server uses: dir, or where the link dir points
	owner owner
}

// plain are paths that RabbitMQ's shell scripts take unharmed.
var plain = regexp.MustCompile(`^[A-Za-z0-9/._+@-]+$`)

// locate finds the place of dir and creates nothing. A clone may lie in a folder
// that the servers' user cannot enter, such as /root with mode 700. Opening that
// folder is not ours to do, so the files then live under /var/tmp, which survives
// a reboot, and dir becomes a link to them. Once made, that choice is kept.
func locate(dir, account string) (place, error) {
	abs, err := physical(dir)
	if err != nil {
		return place{}, err
	}
	own, err := lookupOwner(account)
	if err != nil {
		return place{}, err
	}
	id := fmt.Sprintf("txbox-%x", sha256.Sum256([]byte(abs)))[:18]
	p := place{id: id, dir: abs, home: abs, owner: own}
	away := filepath.Join("/var/tmp", id)
	link, err := os.Readlink(abs)
	switch {
	case err == nil && link == away:
		p.home = away
	case err == nil: // a link that was copied here from another clone
		fallthrough
	case errors.Is(err, fs.ErrNotExist):
		if !plain.MatchString(abs) || !own.enters(filepath.Dir(abs)) {
			p.home = away
		}
	}
	return p, nil
}

// physical is dir without symbolic links, dir itself excepted, so that each way
// to write a path leads to the same server. What does not exist yet stays as it is.
func physical(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	rest := filepath.Base(abs)
	for parent := filepath.Dir(abs); ; parent = filepath.Dir(parent) {
		real, err := filepath.EvalSymlinks(parent)
		if err == nil {
			return filepath.Join(real, rest), nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		rest = filepath.Join(filepath.Base(parent), rest)
	}
}

// create makes the home, and the link to it. It is safe to repeat.
func (p place) create() error {
	if err := makeParents(filepath.Dir(p.dir)); err != nil {
		return err
	}
	link, err := os.Readlink(p.dir)
	if err == nil && link != p.home {
		if err := os.Remove(p.dir); err != nil {
			return err
		}
	}
	if p.home != p.dir && (err != nil || link != p.home) {
		if err := os.Symlink(p.home, p.dir); err != nil {
			return err
		}
	}
	if err := os.Mkdir(p.home, 0o700); err == nil {
		return p.owner.give(p.home)
	} else if !errors.Is(err, fs.ErrExist) {
		return err
	}
	return p.check()
}

// check refuses a home that was made by somebody else: anybody may write to
// /var/tmp, and a clone may have been used by another user before.
func (p place) check() error {
	info, err := os.Lstat(p.home)
	if err != nil {
		return err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || int(stat.Uid) != p.owner.uid {
		return fmt.Errorf("%s does not belong to user %s: stop what runs there and remove it", p.home, p.owner.name)
	}
	if !p.owner.enters(p.home) {
		return fmt.Errorf("user %s cannot enter %s: remove it and start again", p.owner.name, p.home)
	}
	return nil
}

// makeParents is os.MkdirAll whatever the umask says: others must pass.
func makeParents(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := makeParents(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Chmod(dir, 0o755)
}

func (p place) path(name string) string { return filepath.Join(p.home, name) }

// read returns a file of the home without its line end; "" if there is none.
func (p place) read(name string) string {
	content, _ := os.ReadFile(p.path(name))
	return strings.TrimSpace(string(content))
}

// write puts a whole file into the home, which belongs to its owner.
func (p place) write(name, content string) error {
	temporary := p.path(name + ".new")
	if err := os.RemoveAll(temporary); err != nil {
		return err
	}
	file, err := os.OpenFile(temporary, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = file.WriteString(content)
	if err := errors.Join(err, p.owner.giveFile(file), file.Close()); err != nil {
		return err
	}
	return os.Rename(temporary, p.path(name))
}

// owner is the user that a server runs as.
type owner struct {
	name     string
	uid, gid int
	other    bool // not the user that this process runs as
}

// lookupOwner returns the system user account if this process is root, else the
// user that it runs as.
func lookupOwner(account string) (owner, error) {
	if uid := os.Getuid(); uid != 0 {
		return owner{name: strconv.Itoa(uid), uid: uid, gid: os.Getgid()}, nil
	}
	u, err := user.Lookup(account)
	if err != nil {
		return owner{}, err
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return owner{}, err
	}
	gid, err := strconv.Atoi(u.Gid)
	return owner{name: account, uid: uid, gid: gid, other: true}, err
}

// enters asks the system, as only that knows about access lists and mounts.
func (o owner) enters(dir string) bool {
	for {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		dir = filepath.Dir(dir)
	}
	cmd := exec.Command("test", "-x", dir)
	cmd.SysProcAttr = o.attributes()
	return cmd.Run() == nil
}

func (o owner) attributes() *syscall.SysProcAttr {
	if !o.other {
		return &syscall.SysProcAttr{}
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(o.uid), Gid: uint32(o.gid)}}
}

func (o owner) give(path string) error {
	if !o.other {
		return nil
	}
	return os.Lchown(path, o.uid, o.gid)
}

func (o owner) giveFile(file *os.File) error {
	if !o.other {
		return nil
	}
	return file.Chown(o.uid, o.gid)
}
