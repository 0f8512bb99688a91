package dbschema

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Version is the version of the schema that this program was written for: the
// number of the newest file in package migrations.
const Version = 1

// ErrIncompatible says that the schema has moved on so far that this program
// must not touch it.
var ErrIncompatible = errors.New("database schema is incompatible with this program")

// ErrNotReady says that the schema is missing, unreadable or older than this
// program wants. Somebody may migrate it at any moment, so it is worth waiting.
var ErrNotReady = errors.New("database schema is not ready")

// unnamed leaves no statement behind in a session that a pooler hands to others.
const unnamed = pgx.QueryExecModeExec

// Querier is what a pool, a connection and a transaction have in common.
type Querier interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// CheckVersion returns nil if this program may work on the schema: its version
// is at least Version, and it is compatible since Version or earlier. Otherwise
// the error wraps ErrIncompatible or ErrNotReady, or it is the database's own.
func CheckVersion(ctx context.Context, db Querier, name string) error {
	var version, compatibleSince int
	sql := "SELECT version, compatible_since FROM " + pgx.Identifier{name, "txbox_version"}.Sanitize()
	err := db.QueryRow(ctx, sql, unnamed).Scan(&version, &compatibleSince)
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &pgErr) && pgErr.Code == "42501":
		return fmt.Errorf("%w: schema %q: %s; the documentation of packages relay and inbox lists what their roles must be granted",
			ErrNotReady, name, pgErr.Message)
	case errors.As(err, &pgErr) && (pgErr.Code == "42P01" || pgErr.Code == "3F000"):
		return fmt.Errorf("%w: schema %q: %s; if that is its name, run \"relay migrate up%s\"", ErrNotReady, name, pgErr.Message, flag(name))
	case errors.Is(err, pgx.ErrNoRows):
		return fmt.Errorf("%w: schema %q: txbox_version is empty", ErrNotReady, name)
	case err != nil:
		return fmt.Errorf("read schema version: %w", err)
	case compatibleSince > Version:
		return fmt.Errorf("%w: schema %q has version %d and serves programs since version %d, this one is of version %d",
			ErrIncompatible, name, version, compatibleSince, Version)
	case version < Version:
		return fmt.Errorf("%w: schema %q has version %d, this program wants %d; run \"relay migrate up%s\"",
			ErrNotReady, name, version, Version, flag(name))
	}
	return nil
}

// flag is what the command needs to migrate the schema.
func flag(name string) string {
	if name == Default {
		return ""
	}
	return " --schema=" + name
}

// CheckSession returns nil if the sessions of db can do the work: they may write,
// and text travels as it is. Otherwise the error wraps ErrNotReady and names the
// setting, or it is the database's own.
func CheckSession(ctx context.Context, db Querier) error {
	var readOnly, encoding, stored string
	err := db.QueryRow(ctx, "SELECT current_setting('transaction_read_only'), current_setting('client_encoding'), current_setting('server_encoding')", unnamed).
		Scan(&readOnly, &encoding, &stored)
	switch {
	case err != nil:
		return fmt.Errorf("read settings: %w", err)
	case readOnly == "on":
		return fmt.Errorf("%w: the database is read-only (a standby, or default_transaction_read_only)", ErrNotReady)
	case stored != "UTF8" && stored != "SQL_ASCII":
		return fmt.Errorf("%w: the database is encoded in %s, txbox needs UTF8", ErrNotReady, stored)
	case encoding != "UTF8" && encoding != "SQL_ASCII":
		return fmt.Errorf("%w: client_encoding is %s, set it to UTF8 for this role or database", ErrNotReady, encoding)
	}
	return nil
}
