package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/txbox/txbox/internal/dbschema"
	"github.com/txbox/txbox/migrations"
)

type migrateCommand struct {
	Up     migrateUp     `cmd:"" help:"Create the tables, or bring them up to date. Safe to repeat and to race."`
	Down   migrateDown   `cmd:"" help:"Remove the tables. Refused while messages wait."`
	Status migrateStatus `cmd:"" help:"Show the version of the tables."`
	Print  migratePrint  `cmd:"" help:"Print the SQL of all migrations, for a tool of your own."`
	Force  migrateForce  `cmd:"" help:"Set the version after a migration that ended half-way, once you have mended what it left."`
}

// withTables checks the flags and calls do with what migrations wants.
func (f *databaseFlags) withTables(found mistakes, do func(databaseURL string, cfg migrations.Config) error) error {
	databaseURL, _, wrong := f.check()
	if err := wrongUsage(append(found, wrong...)); err != nil {
		return err
	}
	return do(databaseURL, migrations.Config{Schema: f.Schema})
}

type migrateUp struct{ databaseFlags }

func (c *migrateUp) Run(ctx context.Context, out io.Writer, found mistakes) error {
	return c.withTables(found, func(databaseURL string, cfg migrations.Config) error {
		if err := migrations.Up(ctx, databaseURL, cfg); err != nil {
			return err
		}
		return printState(ctx, out, databaseURL, cfg)
	})
}

type migrateDown struct {
	databaseFlags
	Yes bool `help:"Yes, remove the tables."`
}

func (c *migrateDown) Run(ctx context.Context, out io.Writer, found mistakes) error {
	if !c.Yes {
		found.add(errors.New("migrate down removes the tables; say --yes if you mean it"))
	}
	return c.withTables(found, func(databaseURL string, cfg migrations.Config) error {
		if err := migrations.Down(ctx, databaseURL, cfg); err != nil {
			return err
		}
		return printState(ctx, out, databaseURL, cfg)
	})
}

type migrateStatus struct{ databaseFlags }

func (c *migrateStatus) Run(ctx context.Context, out io.Writer, found mistakes) error {
	return c.withTables(found, func(databaseURL string, cfg migrations.Config) error {
		return printState(ctx, out, databaseURL, cfg)
	})
}

type migrateForce struct {
	databaseFlags
	Version int `arg:"" help:"The last migration that is wholly there; 0 for none."`
}

func (c *migrateForce) Run(ctx context.Context, out io.Writer, found mistakes) error {
	if c.Version < 0 || c.Version > dbschema.Version {
		found.add(fmt.Errorf("version: %d is not one of 0 to %d", c.Version, dbschema.Version))
	}
	return c.withTables(found, func(databaseURL string, cfg migrations.Config) error {
		if err := migrations.Force(ctx, databaseURL, cfg, c.Version); err != nil {
			return err
		}
		return printState(ctx, out, databaseURL, cfg)
	})
}

func printState(ctx context.Context, out io.Writer, databaseURL string, cfg migrations.Config) error {
	state, err := migrations.Status(ctx, databaseURL, cfg)
	if err != nil {
		return err
	}
	text := fmt.Sprintf("schema %s is at version %d of %d", cfg.Schema, state.Version, state.Latest)
	if state.Dirty {
		text += ", and dirty: that migration ended half-way"
	}
	_, err = fmt.Fprintln(out, text)
	return err
}

type migratePrint struct{}

// Run prints the files in the order in which they apply.
func (migratePrint) Run(out io.Writer, found mistakes) error {
	if err := wrongUsage(found); err != nil {
		return err
	}
	files, err := fs.Glob(migrations.FS, "*.up.sql")
	if err != nil {
		return err
	}
	slices.Sort(files)
	for _, file := range files {
		content, err := fs.ReadFile(migrations.FS, file)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(out, "-- %s\n%s\n", path.Base(file), strings.TrimSpace(string(content))); err != nil {
			return err
		}
	}
	return nil
}
