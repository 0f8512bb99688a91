package testenv

import (
	"crypto/rand"
	"fmt"
	"net/url"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// As returns the same schema as a role sees it that may use it, with these
// privileges by table, such as "outbox": "INSERT", and no others. A
// sequence takes the same form: "outbox_id_seq": "USAGE".
func (db *DB) As(t testing.TB, privileges map[string]string) *DB {
	t.Helper()
	ctx := Context(t)
	role, password := Name(t), rand.Text()
	statements := []string{
		fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD '%s'", role, password),
		fmt.Sprintf("GRANT USAGE ON SCHEMA %s TO %s", pgx.Identifier{db.Schema}.Sanitize(), role),
	}
	for table, granted := range privileges {
		statements = append(statements, fmt.Sprintf("GRANT %s ON %s TO %s", granted, db.Table(table), role))
	}
	for _, statement := range statements {
		if _, err := db.Exec(ctx, statement); err != nil {
			t.Fatal(err)
		}
	}
	u, err := url.Parse(db.URL)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, password)
	pool, err := pgxpool.New(ctx, u.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		pool.Close()
		if _, err := db.Exec(Context(t), fmt.Sprintf("DROP OWNED BY %s; DROP ROLE %s", role, role)); err != nil {
			t.Error(err)
		}
	})
	return &DB{Pool: pool, URL: u.String(), Schema: db.Schema}
}
