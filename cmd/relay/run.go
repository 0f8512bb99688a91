package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/txbox/txbox/relay"
)

type runCommand struct {
	databaseFlags
	brokerFlags
	Name         string   `help:"Name shown to people; default host-pid." env:"TXBOX_NAME"`
	Lease        duration `help:"How long the lanes of a relay that died stay its own." default:"15s" env:"TXBOX_LEASE"`
	RetryFor     duration `help:"How long a refused message is tried before it is dead." default:"168h" env:"TXBOX_RETRY_FOR"`
	IdleInterval duration `help:"Longest wait between two looks at the outbox." default:"50ms" env:"TXBOX_IDLE_INTERVAL"`
	StopTimeout  duration `help:"Longest clean stop." default:"20s" env:"TXBOX_STOP_TIMEOUT"`
	LogLevel     string   `help:"debug, info, warn or error." default:"info" env:"TXBOX_LOG_LEVEL"`
	LogFormat    string   `help:"text or json." default:"text" env:"TXBOX_LOG_FORMAT"`
}

// maxConns is more than the 3 that a relay uses at once, so that a connection that
// is being closed holds nobody up.
const maxConns = 4

// Run publishes until ctx ends. Servers may be down: it waits for them.
func (c *runCommand) Run(ctx context.Context, found mistakes) error {
	log, wrong := c.logger(os.Stderr)
	found = append(append(found, wrong...), c.mistakes()...)
	_, dbConfig, wrong := c.databaseFlags.check()
	found = append(found, wrong...)
	publisher, wrong := c.publisher(c.AllowPlaintext.on)
	if err := wrongUsage(append(found, wrong...)); err != nil {
		return err
	}

	dbConfig.MaxConns = maxConns
	db, err := pgxpool.NewWithConfig(ctx, dbConfig) // connects when it is used
	if err != nil {
		return fmt.Errorf("database: %w", err)
	}
	defer closePool(db)
	r, err := relay.New(db, publisher, relay.Config{
		Name: c.Name, Schema: c.Schema, Lease: c.Lease.Duration, RetryFor: c.RetryFor.Duration,
		IdleInterval: c.IdleInterval.Duration, StopTimeout: c.StopTimeout.Duration, Logger: log,
	})
	if err != nil {
		return wrongUsage(mistakes{err})
	}
	return r.Run(ctx)
}

// closePool says goodbye to the database, but does not wait for one that hangs:
// the pool would give it 15 s, on top of the stop timeout.
func closePool(db *pgxpool.Pool) {
	closed := make(chan struct{})
	go func() {
		db.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(time.Second):
	}
}

// mistakes checks the flags that are run's own, and all that New would.
func (c *runCommand) mistakes() (found mistakes) {
	found.add(c.Lease.check("lease", minTimeout, maxTimeout))
	found.add(c.RetryFor.check("retry-for", 1, 100*365*24*time.Hour))
	found.add(c.IdleInterval.check("idle-interval", time.Millisecond, time.Minute))
	found.add(c.StopTimeout.check("stop-timeout", 1, maxTimeout))
	if c.Lease.err == nil && c.ConfirmTimeout.err == nil && c.Lease.Duration < c.ConfirmTimeout.Duration {
		found.add(mistake("lease", "%s is shorter than %s, %s", c.Lease, setting("confirm-timeout"), c.ConfirmTimeout))
	}
	if len(c.Name) > 255 || !utf8.ValidString(c.Name) {
		found.add(mistake("name", "must be valid UTF-8 of at most 255 bytes"))
	}
	return found
}

func (c *runCommand) logger(out io.Writer) (log *slog.Logger, found mistakes) {
	levels := map[string]slog.Level{
		"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
	}
	level, ok := levels[strings.ToLower(c.LogLevel)]
	if !ok {
		found.add(mistake("log-level", "%s is not debug, info, warn or error", shown(c.LogLevel)))
	}
	options := &slog.HandlerOptions{Level: level}
	switch strings.ToLower(c.LogFormat) {
	case "json":
		return slog.New(slog.NewJSONHandler(out, options)), found
	case "text":
	default:
		found.add(mistake("log-format", "%s is not text or json", shown(c.LogFormat)))
	}
	return slog.New(slog.NewTextHandler(out, options)), found
}
