package servers

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5"
)

// Postgres is a private PostgreSQL server. Its files lie in Dir; where the
// server's user cannot enter Dir, Dir is a link to a folder under /var/tmp.
type Postgres struct {
	Dir string
	// Port is the TCP port on 127.0.0.1. Zero is the port that Dir had before, or
	// at the first Start a free one; Start then sets it.
	Port int
}

// PostgresPackage is the Debian package with the server.
const PostgresPackage = "postgresql"

// Start returns when the server answers queries. It installs the package if it
// is missing, initialises Dir if it is new, recovers from a crash, and does nothing
// if the server serves already. Ending ctx undoes a start that has not succeeded.
func (p *Postgres) Start(ctx context.Context) error {
	if !p.Installed() {
		if err := Install(ctx, PostgresPackage); err != nil {
			return err
		}
	}
	return p.find().do("start PostgreSQL", func(s instance) error { return s.start(ctx) })
}

// Stop ends the server's sessions and the server. It leaves no process, also if
// ctx ends first: then as Kill does.
func (p *Postgres) Stop(ctx context.Context) error {
	return p.find().end("stop PostgreSQL", func(s instance) error { return s.stopAll(ctx) })
}

// Kill ends all processes of the server at once, as a crash does.
func (p *Postgres) Kill() error { return p.find().end("kill PostgreSQL", instance.kill) }

// Pause halts all processes of the server until Resume, Start, Stop or Kill:
// connections stay open and nothing answers.
func (p *Postgres) Pause() error { return p.find().do("pause PostgreSQL", instance.pause) }

// Resume undoes Pause.
func (p *Postgres) Resume() error { return p.find().do("resume PostgreSQL", instance.resume) }

// Remove stops the server and deletes its files.
func (p *Postgres) Remove(ctx context.Context) error {
	return p.find().end("remove PostgreSQL", func(s instance) error { return s.remove(ctx) })
}

// Ready is nil if the server answers a query within two seconds.
func (p *Postgres) Ready(ctx context.Context) error {
	return p.find().do("PostgreSQL", func(s instance) error { return s.ready(ctx) })
}

// URL is for the database txbox, as its superuser. It needs Port or a Start,
// of this or of an earlier process.
func (p *Postgres) URL() string {
	s, err := p.instance()
	if err != nil { // no server yet, so no port that Dir could remember
		return postgresURL(p.Port)
	}
	return s.url(s.knownPort())
}

func postgresURL(port int) string {
	return "postgres://txbox:txbox@" + loopback(port) + "/txbox?sslmode=disable"
}

// Installed reports whether the server's programs are there.
func (p *Postgres) Installed() bool {
	_, err := postgresBin("")
	return err == nil
}

func (p *Postgres) find() finder { return p.instance }

func (p *Postgres) instance() (instance, error) {
	at, err := locate(p.Dir, "postgres")
	return instance{
		place: at, port: &p.Port, ports: 1, url: postgresURL,
		stop:   syscall.SIGINT, // a fast shutdown
		launch: launchPostgres, check: CheckDatabase,
	}, err
}

// CheckDatabase is nil if the server behind url answers a query before ctx ends.
// The error does not hold the password.
func CheckDatabase(ctx context.Context, url string) error {
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		return errors.New("malformed; percent-encode special characters in user and password")
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return errors.New(err.Error()) // the value holds the password
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, "SELECT 1")
	return err
}

func postgresMark(id string) string { return "cluster_name=" + id }

// postgresTitle begins the title of a backend: the server puts cluster_name there.
func postgresTitle(id string) string { return "postgres: " + id + ": " }

func launchPostgres(ctx context.Context, s instance) (<-chan error, error) {
	bin, err := postgresBin(s.read("data/PG_VERSION"))
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(s.path("data")); errors.Is(err, fs.ErrNotExist) {
		if err := initialise(ctx, s, bin); err != nil {
			return nil, fmt.Errorf("initialise %s: %w", s.home, err)
		}
	}
	if err := dropStalePid(s); err != nil {
		return nil, err
	}
	return s.detach(s.command(context.Background(), nil, filepath.Join(bin, "postgres"),
		"-D", s.path("data"),
		"-p", strconv.Itoa(s.knownPort()),
		"-c", "listen_addresses=127.0.0.1",
		"-c", "unix_socket_directories=", // a socket's path may not exceed 107 bytes
		"-c", postgresMark(s.id)))
}

// dropStalePid removes the pid file of a crashed server. The server itself would
// not start if another of its user's processes has been given that number.
func dropStalePid(s instance) error {
	pid, _, _ := strings.Cut(s.read("data/postmaster.pid"), "\n")
	if p, ok := readProcess(filepath.Join("/proc", pid)); ok && slices.Contains(p.argv, s.path("data")) {
		return fmt.Errorf("process %s, which was not started here, serves %s", pid, s.path("data"))
	}
	return os.RemoveAll(s.path("data/postmaster.pid"))
}

// settings are appended to postgresql.conf, not given as arguments, so that a test
// can ALTER SYSTEM. fsync and synchronous_commit stay on: durability is promised.
const settings = `
max_connections = 200
log_line_prefix = '%m [%p] %a '
timezone = 'UTC'
log_timezone = 'UTC'
# Not "$user": tables of examples would land in the schema txbox.
search_path = 'public'
`

// initialise makes the folder data, in whole or not at all. Its own process number
// keeps it apart from the initdb of a crashed one, which may still be at work.
func initialise(ctx context.Context, s instance, bin string) error {
	old, _ := filepath.Glob(s.path("data.half-*"))
	for _, half := range old {
		if err := os.RemoveAll(half); err != nil {
			return err
		}
	}
	half := s.path(fmt.Sprintf("data.half-%d", os.Getpid()))
	if err := s.write("password", "txbox\n"); err != nil {
		return err
	}
	defer os.Remove(s.path("password"))
	_, err := s.run(s.command(ctx, nil, filepath.Join(bin, "initdb"), "--pgdata="+half,
		"--username=txbox", "--pwfile="+s.path("password"), "--auth=scram-sha-256",
		"--encoding=UTF8", "--locale=C.UTF-8"))
	if err != nil {
		return err
	}
	conf, err := os.OpenFile(filepath.Join(half, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = conf.WriteString(settings)
	if err := errors.Join(err, conf.Close()); err != nil {
		return err
	}
	create := s.command(ctx, nil, filepath.Join(bin, "postgres"), "--single", "-D", half,
		"-c", "exit_on_error=true", "postgres")
	create.Stdin = strings.NewReader("CREATE DATABASE txbox\n")
	if _, err := s.run(create); err != nil {
		return err
	}
	return os.Rename(half, s.path("data"))
}
