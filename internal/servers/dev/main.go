// Command dev starts and stops the servers that development and tests use. Their
// files lie in the folder .dev of the repository; .dev/env says where they listen.
//
//	go run ./internal/servers/dev up
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/txbox/txbox/internal/servers/serverstest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) != 2 {
		usage()
	}
	do := map[string]func(context.Context, *environment) error{
		"up": up, "down": down, "status": status, "compiler": compiler,
		"restart-broker": restartBroker, "close-connections": closeConnections,
	}[os.Args[1]]
	if do == nil {
		usage()
	}
	if err := run(ctx, do); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: dev up|down|status|compiler|restart-broker|close-connections")
	os.Exit(2)
}

// run holds a lock meanwhile, so that two calls at once do one after the other
// what each of them would do alone.
func run(ctx context.Context, do func(context.Context, *environment) error) error {
	root, err := repository()
	if err != nil {
		return err
	}
	env := newEnvironment(root)
	if err := os.MkdirAll(env.dir, 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(env.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	return do(ctx, env)
}

// repository is the nearest folder upwards with deploy/compose.yaml.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "deploy", "compose.yaml")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("run this inside the repository")
		}
		dir = filepath.Dir(dir)
	}
}

func up(ctx context.Context, env *environment) error {
	if err := env.provide(ctx); err != nil {
		return err
	}
	if err := env.each(func(b *backend) error { return b.up(ctx) }); err != nil {
		return err
	}
	return env.write()
}

// down also takes away what tests left behind that were killed.
func down(ctx context.Context, env *environment) error {
	err := env.each(func(b *backend) error { return b.down(ctx) })
	return errors.Join(err, env.composeDown(ctx), env.forget(), serverstest.Sweep(ctx))
}

func status(ctx context.Context, env *environment) error {
	return env.each(func(b *backend) error { return b.status(ctx) })
}
