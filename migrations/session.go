package migrations

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"net"
	"sync"
	"time"

	"github.com/golang-migrate/migrate/v4"
	pgxmigrate "github.com/golang-migrate/migrate/v4/database/pgx/v5"
	"github.com/golang-migrate/migrate/v4/source/iofs"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/txbox/txbox/internal/dbschema"
)

// table is golang-migrate's own bookkeeping. A name of its own also gives an
// advisory lock of its own.
const table = "txbox_migrations"

// connectTimeout is the default: a host that swallows packets takes minutes.
const connectTimeout = 10 * time.Second

// session is one private database connection with search_path set. It must not
// be shared: golang-migrate closes what it is handed.
type session struct {
	config *pgx.ConnConfig
	db     *sql.DB
	schema string
}

// parse takes what the programs take: also the settings of a pool, which is not
// needed here.
func parse(databaseURL string) (*pgx.ConnConfig, error) {
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	return config.ConnConfig, nil
}

func run(ctx context.Context, databaseURL string, cfg Config, do func(*session) error) error {
	schema, err := dbschema.Name(cfg.Schema)
	if err != nil {
		return fmt.Errorf("migrations: %w", err)
	}
	config, err := parse(databaseURL)
	if err != nil {
		return fmt.Errorf("migrations: %w", err)
	}
	if config.ConnectTimeout == 0 {
		config.ConnectTimeout = connectTimeout
	}
	config.RuntimeParams["search_path"] = pgx.Identifier{schema}.Sanitize()
	config.RuntimeParams["application_name"] = "txbox migrations"
	stop := cutOnCancel(ctx, config)
	defer stop()

	s := &session{config: config, db: stdlib.OpenDB(*config), schema: schema}
	s.db.SetMaxOpenConns(1)
	defer s.db.Close()
	if err := do(s); err != nil {
		if ctx.Err() != nil {
			err = errors.Join(context.Cause(ctx), err)
		}
		return fmt.Errorf("migrations: %w", err)
	}
	return nil
}

// cutOnCancel makes ctx end every wait on the connections that config opens, by
// closing them. golang-migrate takes no context and waits for its lock without
// a limit.
func cutOnCancel(ctx context.Context, config *pgx.ConnConfig) (stop func() bool) {
	var mu sync.Mutex
	var conns []net.Conn
	dial := config.DialFunc
	config.DialFunc = func(dialCtx context.Context, network, addr string) (net.Conn, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		conn, err := dial(dialCtx, network, addr)
		if err == nil {
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
		}
		return conn, err
	}
	return context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		for _, conn := range conns {
			conn.Close()
		}
	})
}

// createSchema looks before it creates, so that a role without CREATE on the
// database can migrate a schema that was made for it.
func (s *session) createSchema(ctx context.Context) error {
	exists, err := s.exists(ctx, "SELECT FROM pg_catalog.pg_namespace WHERE nspname = $1", s.schema)
	if err != nil || exists {
		return err
	}
	_, err = s.db.ExecContext(ctx, "CREATE SCHEMA IF NOT EXISTS "+pgx.Identifier{s.schema}.Sanitize())
	// IF NOT EXISTS does not help against a session that commits the same name
	// in between: then the name is taken (23505), which is what we wanted.
	if pgErr := (*pgconn.PgError)(nil); errors.As(err, &pgErr) && (pgErr.Code == "23505" || pgErr.Code == "42P06") {
		return nil
	}
	if err != nil {
		return fmt.Errorf("create schema %q: %w", s.schema, err)
	}
	return nil
}

func (s *session) exists(ctx context.Context, query string, args ...any) (found bool, err error) {
	err = s.db.QueryRowContext(ctx, "SELECT EXISTS ("+query+")", args...).Scan(&found)
	return found, err
}

// state reads golang-migrate's table without creating it.
func (s *session) state() (State, error) {
	state := State{Latest: dbschema.Version}
	query := "SELECT version, dirty FROM " + pgx.Identifier{s.schema, table}.Sanitize()
	err := s.db.QueryRow(query).Scan(&state.Version, &state.Dirty)
	pgErr := (*pgconn.PgError)(nil)
	if errors.Is(err, sql.ErrNoRows) || errors.As(err, &pgErr) && (pgErr.Code == "42P01" || pgErr.Code == "3F000") {
		return state, nil
	}
	if err != nil {
		return state, fmt.Errorf("read version: %w", err)
	}
	return state, nil
}

// checkCompatible asks a schema that is newer than this program whether it still
// serves it.
func (s *session) checkCompatible(ctx context.Context) error {
	conn, err := pgx.ConnectConfig(ctx, s.config)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return dbschema.CheckVersion(ctx, conn, s.schema)
}

func (s *session) checkEmpty(ctx context.Context) error {
	for _, name := range []string{"outbox", "outbox_parked", "inbox_parked"} {
		found, err := s.exists(ctx, "SELECT FROM "+pgx.Identifier{s.schema, name}.Sanitize())
		if err != nil {
			return fmt.Errorf("look into %s: %w", name, err)
		}
		if found {
			return fmt.Errorf("%w: table %s is not empty", ErrNotEmpty, name)
		}
	}
	return nil
}

func (s *session) migrate(do func(*migrate.Migrate) error) error {
	// golang-migrate closes what it gets, so it gets a pool of its own.
	db := stdlib.OpenDB(*s.config)
	driver, err := pgxmigrate.WithInstance(db, &pgxmigrate.Config{MigrationsTable: table, SchemaName: s.schema})
	if err != nil {
		db.Close()
		return fmt.Errorf("open: %w", err)
	}
	defer driver.Close()
	files, err := iofs.New(FS, ".")
	if err != nil {
		return fmt.Errorf("read files: %w", err)
	}
	defer files.Close()
	m, err := migrate.NewWithInstance("iofs", files, "pgx5", driver)
	if err != nil {
		return err
	}
	m.LockTimeout = time.Duration(math.MaxInt64) // ctx decides
	err = do(m)
	dirty := migrate.ErrDirty{}
	switch {
	case errors.Is(err, migrate.ErrNoChange):
		return nil
	case errors.As(err, &dirty):
		return fmt.Errorf("%w: version %d of schema %q is marked dirty; see \"relay migrate force --help\"",
			ErrDirty, dirty.Version, s.schema)
	}
	return err
}
