package migrations

import (
	"context"
	"embed"
	"errors"
	"fmt"

	"github.com/golang-migrate/migrate/v4"
	"github.com/golang-migrate/migrate/v4/database"

	"github.com/txbox/txbox/internal/dbschema"
)

// FS holds the numbered SQL files, for those who run migrations with a tool of
// their own. Their statements are unqualified: set search_path to the schema.
//
//go:embed *.sql
var FS embed.FS

// Config is what Up, Down and Status may be told. The zero value works.
type Config struct {
	Schema string // the database schema for txbox's tables; default "txbox"
}

var (
	// ErrDirty is returned when an earlier run ended in the middle of a
	// migration. Look at what the database's log says of it, then use Force.
	ErrDirty = errors.New("a migration ended half-way")
	// ErrNotEmpty is returned by Down while messages are waiting or parked.
	ErrNotEmpty = errors.New("messages would be lost")
	// ErrIncompatible is returned by Up when the schema was migrated by a newer
	// program that no longer serves this one.
	ErrIncompatible = dbschema.ErrIncompatible
)

// State is what Status reports.
type State struct {
	Version int  // the newest migration applied; 0 is none
	Latest  int  // the newest migration that this program knows
	Dirty   bool // the migration to Version ended half-way
}

// Up creates the schema if it is missing and applies every migration that it
// lacks. It is idempotent, and any number of processes may race. A schema newer
// than this program is left alone: nil if it still serves this program,
// ErrIncompatible if not. ErrDirty is returned when an earlier run ended
// half-way.
//
// The databaseURL must lead to PostgreSQL itself, not to a pooler in transaction
// mode, as a role that may create objects in the schema. Cancelling ctx cuts the
// connection; a migration under way is rolled back by the server and leaves the
// dirty mark.
func Up(ctx context.Context, databaseURL string, cfg Config) error {
	return run(ctx, databaseURL, cfg, func(s *session) error {
		if err := s.createSchema(ctx); err != nil {
			return err
		}
		state, err := s.state()
		if err != nil {
			return err
		}
		if state.Version > state.Latest && !state.Dirty {
			return s.checkCompatible(ctx)
		}
		return s.migrate((*migrate.Migrate).Up)
	})
}

// Down removes everything that Up made except the schema itself. It returns
// ErrNotEmpty while messages are waiting or parked in it: stop the writers, let
// the relay drain, and settle what is parked. The record of received messages
// (table inbox) goes too. Otherwise Down is like Up.
func Down(ctx context.Context, databaseURL string, cfg Config) error {
	return run(ctx, databaseURL, cfg, func(s *session) error {
		state, err := s.state()
		if err != nil || state.Version == 0 {
			return err
		}
		if state.Version > state.Latest {
			return fmt.Errorf("schema %q has version %d, this program knows %d: use the newer program",
				s.schema, state.Version, state.Latest)
		}
		if err := s.checkEmpty(ctx); err != nil {
			return err
		}
		return s.migrate((*migrate.Migrate).Down)
	})
}

// Status reports which migrations are applied. It changes nothing.
func Status(ctx context.Context, databaseURL string, cfg Config) (State, error) {
	var state State
	err := run(ctx, databaseURL, cfg, func(s *session) (err error) {
		state, err = s.state()
		return err
	})
	return state, err
}

// Force records that the schema is at version, without running anything, and
// clears the dirty mark. It is for a human who has looked at the schema after
// ErrDirty and knows: every file is one transaction, so the version that is
// marked dirty is either in table txbox_version (force it) or not (force the one
// before, then Up).
func Force(ctx context.Context, databaseURL string, cfg Config, version int) error {
	if version < 0 || version > dbschema.Version {
		return fmt.Errorf("version: %d is not one of 0 to %d", version, dbschema.Version)
	}
	return run(ctx, databaseURL, cfg, func(s *session) error {
		if version == 0 {
			version = database.NilVersion
		}
		return s.migrate(func(m *migrate.Migrate) error { return m.Force(version) })
	})
}
