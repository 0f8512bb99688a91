package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/dbschema"
)

type statusCommand struct {
	databaseFlags
	JSON    bool     `help:"Print one JSON object."`
	Timeout duration `help:"How long the database may take." default:"10s" env:"TXBOX_STATUS_TIMEOUT"`
}

// status is what the tables say at one moment.
type status struct {
	Schema           string           `json:"schema"`
	SchemaVersion    int              `json:"schema_version"`
	Pending          int64            `json:"pending"` // exact up to pendingLimit
	PendingIsExact   bool             `json:"pending_is_exact"`
	OldestAgeSeconds float64          `json:"oldest_pending_age_seconds"`
	Parked           map[string]int64 `json:"parked"`
	Relays           []relayRow       `json:"relays"`
	OrphanLanes      int64            `json:"orphan_lanes"` // that no live relay owns
}

type relayRow struct {
	Name             string  `json:"name"`
	Lanes            int64   `json:"lanes"`
	LeaseLeftSeconds float64 `json:"lease_left_seconds"`
}

const pendingLimit = 10_000

const versionSQL = `SELECT version FROM {version}`

// pendingSQL reads at most pendingLimit+1 index entries; the oldest is the message of
// the lowest id.
const pendingSQL = `SELECT
	(SELECT count(*) FROM (SELECT FROM {outbox} LIMIT $1 + 1) AS o),
	coalesce((SELECT extract(epoch FROM clock_timestamp() - created_at) FROM {outbox} ORDER BY id LIMIT 1), 0)::float8`

const parkedSQL = `SELECT reason, count(*) FROM {parked} GROUP BY reason`

const relaysSQL = `SELECT r.name, (SELECT count(*) FROM {lane} AS l WHERE l.owner = r.id),
		extract(epoch FROM r.leased_until - clock_timestamp())::float8
	FROM {relay} AS r WHERE r.leased_until > clock_timestamp() ORDER BY r.name, r.id`

const orphansSQL = `SELECT count(*) FROM {lane} AS l
	WHERE NOT EXISTS (SELECT FROM {relay} AS r WHERE r.id = l.owner AND r.leased_until > clock_timestamp())`

// Run prints the status. It fails if the database or the tables are not there.
func (c *statusCommand) Run(ctx context.Context, out io.Writer, found mistakes) error {
	_, config, wrong := c.databaseFlags.check()
	found = append(found, wrong...)
	found.add(c.Timeout.check("timeout", 1, maxTimeout))
	if err := wrongUsage(found); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.Timeout.Duration)
	defer cancel()
	db, err := pgx.ConnectConfig(ctx, config.ConnConfig)
	if err != nil {
		return fmt.Errorf("database: %w", err)
	}
	defer db.Close(ctx)
	if err := dbschema.CheckVersion(ctx, db, c.Schema); err != nil {
		return err
	}
	s, err := readStatus(ctx, db, c.Schema)
	if err != nil {
		return err
	}
	if c.JSON {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		return encoder.Encode(s)
	}
	_, err = io.WriteString(out, s.text())
	return err
}

func readStatus(ctx context.Context, db *pgx.Conn, schema string) (*status, error) {
	names := strings.NewReplacer(
		"{version}", pgx.Identifier{schema, "txbox_version"}.Sanitize(),
		"{outbox}", pgx.Identifier{schema, "outbox"}.Sanitize(),
		"{parked}", pgx.Identifier{schema, "outbox_parked"}.Sanitize(),
		"{relay}", pgx.Identifier{schema, "outbox_relay"}.Sanitize(),
		"{lane}", pgx.Identifier{schema, "outbox_lane"}.Sanitize(),
	)
	s := &status{
		Schema: schema, Relays: []relayRow{},
		Parked: map[string]int64{"scheduled": 0, "retry": 0, "blocked": 0, "dead": 0},
	}
	batch := &pgx.Batch{}
	batch.Queue(names.Replace(versionSQL)).QueryRow(func(row pgx.Row) error { return row.Scan(&s.SchemaVersion) })
	batch.Queue(names.Replace(pendingSQL), pendingLimit).QueryRow(func(row pgx.Row) error {
		return row.Scan(&s.Pending, &s.OldestAgeSeconds)
	})
	batch.Queue(names.Replace(parkedSQL)).Query(func(rows pgx.Rows) error {
		var reason string
		var n int64
		_, err := pgx.ForEachRow(rows, []any{&reason, &n}, func() error { s.Parked[reason] = n; return nil })
		return err
	})
	batch.Queue(names.Replace(relaysSQL)).Query(func(rows pgx.Rows) error {
		relays, err := pgx.CollectRows(rows, pgx.RowToStructByPos[relayRow])
		s.Relays = append(s.Relays, relays...)
		return err
	})
	batch.Queue(names.Replace(orphansSQL)).QueryRow(func(row pgx.Row) error { return row.Scan(&s.OrphanLanes) })
	moment := pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
	err := pgx.BeginTxFunc(ctx, db, moment, func(tx pgx.Tx) error { return tx.SendBatch(ctx, batch).Close() })
	if err != nil {
		return nil, fmt.Errorf("read the tables: %w", err)
	}
	s.PendingIsExact = s.Pending <= pendingLimit
	s.Pending = min(s.Pending, pendingLimit)
	return s, nil
}

func (s *status) text() string {
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	pending := fmt.Sprint(s.Pending)
	if !s.PendingIsExact {
		pending = ">" + pending
	}
	if s.OldestAgeSeconds > 0 {
		pending += ", the oldest " + seconds(s.OldestAgeSeconds) + " old"
	}
	fmt.Fprintf(w, "schema\t%s, version %d\n", s.Schema, s.SchemaVersion)
	fmt.Fprintf(w, "pending\t%s\n", pending)
	for _, reason := range []string{"scheduled", "retry", "blocked", "dead"} {
		fmt.Fprintf(w, "parked: %s\t%d\n", reason, s.Parked[reason])
	}
	fmt.Fprintf(w, "relays\t%d\n", len(s.Relays))
	for _, r := range s.Relays {
		fmt.Fprintf(w, "  %q\t%d lanes, lease ends in %s\n", r.Name, r.Lanes, seconds(r.LeaseLeftSeconds))
	}
	fmt.Fprintf(w, "orphan lanes\t%d of 64\n", s.OrphanLanes)
	w.Flush()
	return text.String()
}

func seconds(s float64) string {
	return time.Duration(s * float64(time.Second)).Round(100 * time.Millisecond).String()
}
