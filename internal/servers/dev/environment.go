package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/txbox/txbox/internal/servers"
)

// environment is the pair of servers and the file that says where they are.
type environment struct {
	root, dir string
	backends  []*backend
}

// backend is one of the two servers: a private one of ours, one of deploy/compose.yaml,
// or one that the user has and named in an environment variable.
type backend struct {
	name, variable string
	pkg            string // of the distribution
	service        string // in deploy/compose.yaml
	composeURL     string // fits the ports there
	private        privateServer
	check          func(ctx context.Context, url string) error

	url  string // what .dev/env will say
	from origin
}

type privateServer interface {
	Start(context.Context) error
	Stop(context.Context) error
	Ready(context.Context) error
	URL() string
	Installed() bool
}

type origin int

const (
	ours origin = iota
	compose
	users
)

func newEnvironment(root string) *environment {
	dir := filepath.Join(root, ".dev")
	env := &environment{root: root, dir: dir, backends: []*backend{{
		name: "PostgreSQL", variable: "DATABASE_URL",
		pkg: servers.PostgresPackage, service: "postgres",
		composeURL: "postgres://txbox:txbox@127.0.0.1:16432/txbox?sslmode=disable",
		private:    &servers.Postgres{Dir: filepath.Join(dir, servers.PostgresPackage)},
		check:      servers.CheckDatabase,
	}, {
		name: "RabbitMQ", variable: "AMQP_URL",
		pkg: servers.RabbitMQPackage, service: "rabbitmq",
		composeURL: "amqp://guest:guest@127.0.0.1:16672/",
		private:    &servers.RabbitMQ{Dir: filepath.Join(dir, servers.RabbitMQPackage)},
		check:      checkBrokers,
	}}}
	for _, b := range env.backends {
		// A shell that has sourced .dev/env names our own servers.
		url := os.Getenv(b.variable)
		if url != "" && url != b.private.URL() && url != b.composeURL {
			b.url, b.from = url, users
		}
	}
	return env
}

// checkBrokers is content with one of a comma-separated list of URLs.
func checkBrokers(ctx context.Context, urls string) error {
	var errs []error
	for url := range strings.SplitSeq(urls, ",") {
		err := servers.CheckBroker(ctx, strings.TrimSpace(url))
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// provide decides where each server comes from and installs what that needs.
// Packages are preferred to containers, as tests kill and pause their processes.
func (e *environment) provide(ctx context.Context) error {
	var missing []*backend
	for _, b := range e.backends {
		if b.from == ours && !b.private.Installed() {
			missing = append(missing, b)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if dockerServes(ctx) {
		return e.composeUp(ctx, missing)
	}
	var packages []string
	for _, b := range missing {
		packages = append(packages, b.pkg)
	}
	if err := install(ctx, packages...); err != nil {
		return fmt.Errorf("%w\n(or set %s to a server that you have)", err, missing[0].variable)
	}
	return nil
}

// compiler installs a C compiler if there is none: the race detector needs one.
func compiler(ctx context.Context, _ *environment) error {
	if _, err := exec.LookPath("gcc"); err == nil {
		return nil
	}
	return install(ctx, "gcc", "libc6-dev")
}

func install(ctx context.Context, packages ...string) error {
	fmt.Printf("installing %s (apt-get)\n", strings.Join(packages, ", "))
	began := time.Now()
	if err := servers.Install(ctx, packages...); err != nil {
		return err
	}
	fmt.Printf("installed in %s\n", since(began))
	return nil
}

func dockerServes(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return exec.CommandContext(ctx, "docker", "compose", "version").Run() == nil &&
		exec.CommandContext(ctx, "docker", "info").Run() == nil
}

func (e *environment) composeMark() string { return filepath.Join(e.dir, "compose") }

func (e *environment) composeUp(ctx context.Context, missing []*backend) error {
	args := []string{"up", "-d", "--wait"}
	for _, b := range missing {
		b.url, b.from = b.composeURL, compose
		args = append(args, b.service)
	}
	if err := os.WriteFile(e.composeMark(), nil, 0o600); err != nil {
		return err
	}
	return e.docker(ctx, args...)
}

func (e *environment) composeDown(ctx context.Context) error {
	if _, err := os.Stat(e.composeMark()); err != nil {
		return nil
	}
	if err := e.docker(ctx, "down"); err != nil {
		return err
	}
	return os.Remove(e.composeMark())
}

func (e *environment) docker(ctx context.Context, args ...string) error {
	file := filepath.Join(e.root, "deploy", "compose.yaml")
	cmd := exec.CommandContext(ctx, "docker", append([]string{"compose", "-f", file}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// each does the same to all servers at once.
func (e *environment) each(do func(*backend) error) error {
	errs := make([]error, len(e.backends))
	var all sync.WaitGroup
	for i, b := range e.backends {
		all.Go(func() { errs[i] = do(b) })
	}
	all.Wait()
	return errors.Join(errs...)
}

func (e *environment) envFile() string { return filepath.Join(e.dir, "env") }

// write leaves the URLs to shells and to make's recipes.
func (e *environment) write() error {
	var text strings.Builder
	for _, b := range e.backends {
		fmt.Fprintf(&text, "export %s='%s'\n", b.variable, strings.ReplaceAll(b.url, "'", `'\''`))
	}
	temporary := e.envFile() + ".new"
	if err := os.WriteFile(temporary, []byte(text.String()), 0o600); err != nil {
		return err
	}
	return os.Rename(temporary, e.envFile())
}

func (e *environment) forget() error { return os.RemoveAll(e.envFile()) }
